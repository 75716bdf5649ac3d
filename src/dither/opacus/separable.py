"""The proof that a scalar loss is a sum of one term per example of the tensors that it reads.

Its derivative by one example's entries must not depend on another example's entries: that shows in the second
derivative, except where the loss is piecewise linear (an absolute value, a maximum), so what such operations look at
must belong to one example.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge

from dither.capture.examples import ExampleAxis
from dither.capture.layouts import separating_groups
from dither.capture.probing import Seed, nan_on_purpose
from dither.errors import CoupledExamplesError, CoverageError

_POINTWISE = frozenset(
    [
        "Abs",
        "Relu",
        "LeakyRelu",
        "Clamp",
        "ClampMin",
        "ClampMax",
        "Threshold",
        "Hardtanh",
        "Maximum",
        "Minimum",
        "Fmax",
        "Fmin",
        "L1Loss",
        "PreluKernel",
        "Prelu",
        "Rrelu",
        "RreluWithNoise",
        "Hardshrink",
        "Softshrink",
        "Hardsigmoid",
        "Hardswish",
    ]
)
_SELECTING = frozenset(
    [
        "Max",
        "Min",
        "Amax",
        "Amin",
        "Aminmax",
        "Topk",
        "Sort",
        "Median",
        "Nanmedian",
        "Kthvalue",
        "Mode",
        "Cummax",
        "Cummin",
        "Logcumsumexp",
        "LinalgVectorNorm",
        "Norm",
        "MaxPool2DWithIndices",
        "MaxPool3DWithIndices",
        "AdaptiveMaxPool2D",
        "AdaptiveMaxPool3D",
    ]
)
"""Names of graph nodes whose second derivative is zero: entry by entry, or by comparing entries along axes."""

_OPAQUE = {"CtcLoss": 1, "CudnnCtcLoss": 1, "MultiMarginLoss": 0, "MultilabelMarginLoss": 0}
"""Losses without a second derivative, and their inputs' example axis: each lists one term per example, or sums them."""

_FIX = (
    "let the loss be a mean or a sum of one term per example (no statistics over the batch, no root or logarithm of "
    "the batch mean, no maximum over the batch, no in-batch negatives)"
)
_SAY_SO = "if it is one, say so: module.verify_loss = False; or return the losses from the module"


def prove_separable(roots: Sequence[Tensor], seeds: Sequence[Seed], nodes: Sequence[Any]) -> None:
    """Raise unless the loss is a sum of one term per example of what it reads.

    Args:
        roots: losses.
        seeds: the places that they read, the examples' layout known.
        nodes: the graph's nodes from the losses to those places.

    Raises:
        CoupledExamplesError: a term depends on several examples.
        CoverageError: it could not be proved.
    """
    for batch in {seed.layout.batch for seed in seeds if seed.layout.batch > 1}:
        same = [seed for seed in seeds if seed.layout.batch == batch]
        try:
            _refuse_comparisons(nodes, same)
            read = _behind_opaque_losses(roots, nodes, same)
            coupled = _coupled_by(roots, read, separating_groups(batch)[0], nodes)
        except RuntimeError as error:
            raise CoverageError(
                f"That the loss is a sum of one term per example could not be proved: {error}", fix=_SAY_SO
            ) from error
        if coupled is not None:
            which = f"example {coupled[0]}" if len(coupled) == 1 else f"{len(coupled)} examples"
            raise CoupledExamplesError(
                f"The loss couples the examples: its derivative by the outputs of {which} depends on other examples.",
                fix=_FIX,
            )


def _refuse_comparisons(nodes: Sequence[Any], seeds: Sequence[Seed]) -> None:
    for node in nodes:
        kind = _kind(node)
        if kind not in _POINTWISE and kind not in _SELECTING:
            continue
        operands = [GradientEdge(parent, number) for parent, number in node.next_functions if parent is not None]
        shapes = [_shape(edge.node, edge.output_nr) for edge in operands]
        for looked_at in zip(*(_compared(node, kind, shape) for shape in shapes), strict=True):
            if _examples_behind(operands, looked_at, seeds) > 1:
                raise CoupledExamplesError(
                    f"The loss couples the examples: {kind.lower()} of a tensor of shape {tuple(shapes[0])} looks at "
                    "several examples at once.",
                    fix=_FIX,
                )


def _behind_opaque_losses(roots: Sequence[Tensor], nodes: Sequence[Any], seeds: list[Seed]) -> list[Seed]:
    """In place of the seeds, the results of losses without a second derivative, if the roots read nothing else.

    Raises:
        CoupledExamplesError: the root is not linear in a reduced loss.
    """
    opaque = [node for node in nodes if _kind(node) in _OPAQUE]
    if not opaque:
        return seeds
    found = []
    for node in opaque:
        result = _rows_of(GradientEdge(node, 0), 0, seeds)
        if result is None:
            _refuse_unless_linear(roots, node)
            parent, number = node.next_functions[0]
            result = _rows_of(GradientEdge(parent, number), _OPAQUE[_kind(node)], seeds)
        else:
            found.append(result)
        if result is None or _leaves_its_rows(result, seeds):
            raise CoupledExamplesError(f"The examples are coupled before {_kind(node)}.", fix=_FIX)
    return [*found, *_reads_around(roots, opaque, seeds)]


def _rows_of(edge: GradientEdge, axis: int, seeds: Sequence[Seed]) -> Seed | None:
    """A seed at an edge, one example per entry of an axis, if the axis has as many."""
    shape, batch = _shape(edge.node, edge.output_nr), seeds[0].layout.batch
    if len(shape) <= axis or shape[axis] != batch:
        return None
    like = torch.empty([1] * len(shape), dtype=seeds[0].like.dtype, device=seeds[0].like.device)
    return Seed(edge, like.expand(shape), ExampleAxis(axis, 1, batch, 1))


def _leaves_its_rows(result: Seed, seeds: Sequence[Seed]) -> bool:
    """Whether an example's entries depend on another example."""
    edges = [seed.edge for seed in seeds]
    for group in separating_groups(result.layout.batch)[0]:
        poison = [result.poison(group)]
        with nan_on_purpose():
            sent = torch.autograd.grad([result.edge], edges, poison, retain_graph=True, allow_unused=True)
        if _leaves_group(seeds, sent, group):
            return True
    return False


def _refuse_unless_linear(roots: Sequence[Tensor], node: Any) -> None:
    total = torch.stack([root.sum() for root in roots if root.requires_grad]).sum()
    with torch.enable_grad():
        (derivative,) = torch.autograd.grad(total, [GradientEdge(node, 0)], create_graph=True)
    if derivative.requires_grad:
        raise CoupledExamplesError(f"The loss is not linear in {_kind(node)}, a sum over all examples.", fix=_FIX)


def _reads_around(roots: Sequence[Tensor], opaque: Sequence[Any], seeds: Sequence[Seed]) -> list[Seed]:
    """The seeds that the roots also read around the opaque losses; a loss of both kinds cannot be told apart here."""
    places = {(seed.edge.node, seed.edge.output_nr): seed for seed in seeds}
    stack: list[Any] = [(root.grad_fn, root.output_nr) for root in roots]
    seen, read = set(opaque), []
    while stack:
        node, number = stack.pop()
        if (node, number) in places:
            read.append(places.pop((node, number)))
        elif node is not None and node not in seen:
            seen.add(node)
            stack.extend(node.next_functions)
    return read


def _kind(node: Any) -> str:
    name: str = node.name()
    return name.rstrip("0123456789").removesuffix("Backward")


def _shape(node: Any, number: int) -> torch.Size:
    return torch.Size(node._input_metadata[number].shape)


def _compared(node: Any, kind: str, shape: torch.Size) -> list[Tensor]:
    """Masks of entries that one entry of the result looks at: of the first, and of the last where it is one entry."""
    if kind in _SELECTING:
        axes = getattr(node, "_saved_dim", None)
        chosen = torch.zeros(shape, dtype=torch.bool)
        if axes is None or not shape:
            return [torch.ones(shape, dtype=torch.bool)]
        whole = {_signed(axis) % len(shape) for axis in (axes if isinstance(axes, tuple) else (axes,))}
        chosen[tuple(slice(None) if axis in whole or not whole else 0 for axis in range(len(shape)))] = True
        return [chosen]
    first, last = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.bool)
    first.view(-1)[:1] = True
    last.view(-1)[-1:] = True
    return [first, last]


def _signed(axis: int) -> int:
    return axis - 2**64 if axis >= 2**63 else axis


def _examples_behind(operands: Sequence[GradientEdge], entries: Sequence[Tensor], seeds: Sequence[Seed]) -> int:
    """How many examples some entries of an operation's operands depend on."""
    like = seeds[0].like
    poison = [torch.where(mask.to(like.device), float("nan"), 1.0).to(like.dtype) for mask in entries]
    places = [seed.edge for seed in seeds]
    found = torch.autograd.grad(list(operands), places, poison, retain_graph=True, allow_unused=True)
    reached = torch.zeros(seeds[0].layout.batch, dtype=torch.bool, device=like.device)
    for seed, gradient in zip(seeds, found, strict=True):
        if gradient is not None:
            owners = seed.layout.owners(gradient.device)
            rows = gradient.isnan().movedim(seed.layout.axis, 0).flatten(1).any(1)
            reached[owners[rows]] = True
    return int(reached.sum())


def _coupled_by(
    roots: Sequence[Tensor], seeds: Sequence[Seed], groups: Iterable[list[int]], nodes: Sequence[Any]
) -> list[int] | None:
    """Whether a loss couples the examples of the tensors that it reads.

    A loss is a sum of one term per example exactly if its derivative by one example's entries does not depend on
    another example's entries. The derivative is taken with its own graph, and NaN is sent through that.

    Args:
        roots: losses.
        seeds: the places that the losses read.
        groups: groups of examples to separate from the rest.
        nodes: the graph's nodes from the losses to those places.

    Returns:
        A group that depends on an example outside of it, or None.
    """
    if not seeds:
        return None
    edges = [seed.edge for seed in seeds]
    total = torch.stack([root.sum() for root in roots if root.requires_grad]).sum()
    with torch.enable_grad():
        derivatives = torch.autograd.grad(total, edges, create_graph=True, allow_unused=True)
    if any(isinstance(node, BackwardCFunction) for node in nodes) and any(
        d is not None and not d.requires_grad for d in derivatives
    ):
        raise CoverageError(
            "The loss contains a custom autograd.Function whose derivative has no graph: that it is a sum of one term "
            "per example cannot be proved.",
            fix=_SAY_SO,
        )
    live = [(seed, d) for seed, d in zip(seeds, derivatives, strict=True) if d is not None and d.requires_grad]
    if not live:
        return None
    poisoned: list[Tensor | None] | None = None
    for group in groups:
        sent = _second_order(live, edges, group)
        if not _leaves_group(seeds, sent, group):
            continue
        poisoned = _second_order(live, edges, []) if poisoned is None else poisoned
        pairs = zip(sent, poisoned, strict=True)
        fresh = [s if s is None or p is None else s.masked_fill(p.isnan(), 0) for s, p in pairs]
        if _leaves_group(seeds, fresh, group):
            return group
    return None


def _second_order(
    live: Sequence[tuple[Seed, Tensor]], edges: list[GradientEdge], group: list[int]
) -> list[Tensor | None]:
    derivatives = [derivative for _, derivative in live]
    poison = [seed.poison(group).to(derivative.dtype) for seed, derivative in live]
    with nan_on_purpose():
        return list(torch.autograd.grad(derivatives, edges, poison, retain_graph=True, allow_unused=True))


def _leaves_group(seeds: Sequence[Seed], received: Sequence[Tensor | None], group: list[int]) -> bool:
    """Whether an entry of an example outside the group is NaN."""
    for seed, gradient in zip(seeds, received, strict=True):
        if gradient is None:
            continue
        outside = torch.ones(seed.layout.batch, dtype=torch.bool, device=gradient.device)
        outside[group] = False
        rows = gradient.movedim(seed.layout.axis, 0)[outside[seed.layout.owners(gradient.device)]]
        if bool(rows.isnan().any()):
            return True
    return False
