"""Proofs that nothing escapes: every parameter gradient passes the recorder, every loss is one example's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils.checkpoint import CheckpointError

from dither.capture.custom import CustomNodes
from dither.capture.examples import ExampleAxis, Layout, candidates, consistent, owners_from_bits
from dither.capture.uses import Tape
from dither.errors import CoupledExamplesError, CoverageError, ExampleAxisError, LossShapeError


def check_loss(losses: object) -> Tensor:
    """Return the losses if they are one floating-point number per example, shape (B,).

    Raises:
        LossShapeError: with the shape that was returned and the fix.
    """
    if not isinstance(losses, Tensor) or losses.dim() != 1 or not losses.is_floating_point():
        got = f"shape {tuple(losses.shape)}, {losses.dtype}" if isinstance(losses, Tensor) else type(losses).__name__
        raise LossShapeError(
            f"loss_fn must return one loss per example, a floating-point tensor of shape (B,); it returned {got}.",
            fix="compute the loss with reduction='none', then average each example's own entries: "
            "`loss.flatten(1).mean(1)`",
        )
    return losses


def leaves_of(*roots: Tensor) -> list[Tensor]:
    """Every leaf tensor that autograd's graph of the roots would give a gradient to."""
    return [node.variable for node in nodes_of(roots) if isinstance(getattr(node, "variable", None), Tensor)]


def nodes_of(roots: Sequence[Tensor], accounted: Callable[[Any], set[int]] = lambda node: set()) -> Iterator[Any]:
    """Every node of the roots' graph, but for what lies behind the edges that `accounted` names."""
    return _nodes_behind([root.grad_fn for root in roots], accounted)


def _nodes_behind(nodes: Sequence[Any], accounted: Callable[[Any], set[int]] = lambda node: set()) -> Iterator[Any]:
    stack, seen = list(nodes), set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        done = accounted(node)
        stack.extend(parent for edge, (parent, _) in enumerate(node.next_functions) if edge not in done)


@dataclass(frozen=True)
class Leaves:
    """The leaves behind the losses.

    Attributes:
        others: leaves that are not the model's parameters, whose `.grad` a backward pass changes.
        adopted: names of parameters that a custom autograd function's node takes.
    """

    others: tuple[Tensor, ...]
    adopted: frozenset[str]

    @staticmethod
    def behind(
        losses: Tensor, parameters: Mapping[str, Tensor], custom: CustomNodes, targets: Mapping[Any, Any]
    ) -> Leaves:
        """Find them, and put the uses of custom autograd functions on the tape.

        Args:
            losses: (B,).
            parameters: by name.
            custom: adopts nodes.
            targets: by graph node, parameters and tensors computed from them.

        Raises:
            CoverageError: a parameter is reached by autograd around the recorder.
        """
        names = {id(p): name for name, p in parameters.items()}
        adopted: set[Any] = set()

        def accounted(node: Any) -> set[int]:
            edges = custom.adopt(node, targets)
            adopted.update(node.next_functions[edge][0] for edge in edges)
            return edges

        others = []
        for node in list(nodes_of([losses], accounted)):
            leaf = getattr(node, "variable", None)
            if isinstance(leaf, Tensor):
                if id(leaf) in names:
                    raise _escaped(names[id(leaf)])
                if hasattr(leaf, "of_a_recording") and leaf is not custom.anchor:
                    raise _stale()
                others.append(leaf)
        behind = {id(leaf) for node in adopted for leaf in leaves_of(targets[node][0])}
        behind |= {id(targets[node][0]) for node in adopted}
        return Leaves(tuple(others), frozenset(name for i, name in names.items() if i in behind))


@contextmanager
def nothing_escapes(leaves: Leaves, parameters: Mapping[str, Tensor]) -> Iterator[None]:
    """Run backward passes inside; no parameter may receive a gradient, and no leaf's `.grad` is left changed.

    Raises:
        CoverageError: a parameter is reached by autograd around the recorder.
    """
    before = [(leaf, leaf.grad) for leaf in leaves.others]
    for leaf, _ in before:
        leaf.grad = None
    try:
        with untouched(parameters, leaves.adopted):
            yield
    finally:
        for leaf, grad in before:
            leaf.grad = grad


@contextmanager
def untouched(parameters: Mapping[str, Tensor], adopted: Set[str] = frozenset()) -> Iterator[None]:
    """Run backward passes inside; no parameter may receive a gradient by itself, and each `.grad` is left as it was.

    Args:
        parameters: by name.
        adopted: names of those that may, because their uses are recorded at the node that gives it to them.

    Raises:
        CoverageError: one did, or an activation checkpoint recomputes something else than what was recorded.
    """
    before = {name: p.grad for name, p in parameters.items()}
    for parameter in parameters.values():
        parameter.grad = None
    try:
        yield
        for name, parameter in parameters.items():
            if parameter.grad is not None and name not in adopted:
                raise _escaped(name)
    except CheckpointError as error:
        raise checkpoint_differs(error) from error
    finally:
        for name, parameter in parameters.items():
            parameter.grad = before[name]


def checkpoint_differs(error: CheckpointError) -> CoverageError:
    """The refusal of a checkpoint whose recomputation is not the recorded forward."""
    what = str(error).splitlines()[0]
    return CoverageError(
        f"An activation checkpoint recomputes something else than what ran in the forward: {what}",
        fix="let the checkpointed part do the same each time it runs (preserve_rng_state=True, no state of its own), "
        "or turn activation checkpointing off",
    )


def _stale() -> CoverageError:
    return CoverageError(
        "The losses depend on an output of an earlier recording, whose use of the parameters is over.",
        fix="compute everything that the losses need inside loss_fn, each time; detach what is kept from before",
    )


def _escaped(name: str) -> CoverageError:
    return CoverageError(
        f"Parameter {name} receives gradient outside the recorder, so it would not be clipped.",
        fix="use it through torch operations or a torch.autograd.Function, in this thread, while loss_fn runs (not in "
        "an output computed before, nor in a scripted graph), and let each example's loss depend on it",
    )


@dataclass(frozen=True)
class Seed:
    """A place in the graph where the examples' order is known: the losses, or an output of the model.

    Attributes:
        edge: the place.
        like: a tensor of the same shape, dtype and device; its values do not matter.
        layout: where the examples lie in it.
    """

    edge: GradientEdge
    like: Tensor
    layout: Layout

    @staticmethod
    def of(tensor: Tensor, layout: Layout) -> Seed:
        """The seed at a tensor that requires grad."""
        return Seed(get_gradient_edge(tensor), tensor.detach(), layout)

    def nothing(self) -> Tensor:
        """Zeros."""
        return torch.zeros_like(self.like, memory_format=torch.contiguous_format)

    def poison(self, examples: list[int] | None) -> Tensor:
        """Ones, and NaN in the examples' places (None: in all)."""
        chosen = torch.full((self.layout.batch,), examples is None, device=self.like.device)
        chosen[examples or []] = True
        poisoned = torch.ones_like(self.like, memory_format=torch.contiguous_format)
        poisoned.movedim(self.layout.axis, 0)[chosen[self.layout.owners(self.like.device)]] = float("nan")
        return poisoned


@dataclass(frozen=True)
class Places:
    """Outputs in which the examples are looked for.

    Attributes:
        shapes: their shapes, by index.
        name: what an index stands for, in words.
        is_source: whether nothing recorded or followed lies behind an operation's inputs, by index.
    """

    shapes: Mapping[int, torch.Size]
    name: Callable[[int], str]
    is_source: Callable[[int], bool] = lambda index: False

    @staticmethod
    def of(tape: Tape, anchor: Tensor, nodes: Callable[[], Mapping[int, Any]]) -> Places:
        """The outputs of every recorded operation by their calls' index, and what is followed besides.

        Args:
            tape: the recorded operations.
            anchor: the leaf behind everything that is recorded or followed.
            nodes: finds the graph nodes of the outputs.
        """
        shapes = {c.index: c.output_shape for c in tape.calls} | tape.followed

        def is_source(index: int) -> bool:
            if tape.calls[index].source:
                return True
            node = nodes().get(index)
            behind = [] if node is None else [parent for parent, _ in node.next_functions]
            return not any(getattr(n, "variable", None) is anchor for n in _nodes_behind(behind))

        return Places(shapes, partial(_operation, tape), is_source)


def _operation(tape: Tape, index: int) -> str:
    if index < 0:
        return "an input"
    names = ", ".join(use.name for use in tape.uses if use.call.index == index)
    return f"the output of {tape.calls[index].name} (parameter {names})"


class Probe(Protocol):
    """Sends gradients back to the places of the examples."""

    def __call__(self, examples: list[int] | None, zero: bool = False) -> dict[int, Tensor]:
        """Tell by index which entries were reached: bool, the output's shape.

        Args:
            examples: whose losses send NaN; None: all.
            zero: send zeros instead; which entries receive something else?
        """
        ...


def decide_examples(
    places: Places, batch: int, probe: Probe, thorough: bool = True, known: Mapping[int, ExampleAxis] | None = None
) -> dict[int, Layout | None]:
    """Find where the examples lie in every recorded output, and prove that they do not influence each other.

    Some examples' losses are sent back alone, as NaN: NaN times zero is NaN, so whatever could depend on them becomes
    NaN, also behind weights that are zero now (but not behind a gate that is closed now). The entries reached must lie
    in those examples' places in one layout. Examples are tried until each output's layout is the only one left, or all
    have been tried, when the layouts that are left say the same of every entry that any loss reaches.

    Args:
        places: the outputs to decide, by index.
        batch: B, the number of examples.
        probe: sends NaN back; see `send_back`.
        thorough: separate every ordered pair of examples, in 2 ceil(log2 B) more passes: the examples whose index has
            a bit set are sent back together, then the others, for each bit. Otherwise the first and the last alone.
        known: layouts that are known beforehand, by index; also of places that are not to be decided.

    Returns:
        By index: the layout, or None where no loss reaches the output.

    Raises:
        CoupledExamplesError: a loss reaches another example's entries.
        ExampleAxisError: the output has no axis that the examples fit on.
    """
    if batch == 1:
        return {i: ExampleAxis(0, 1, 1, shape[0] if len(shape) else 1) for i, shape in places.shapes.items()}
    possible = {i: candidates(shape, batch) for i, shape in places.shapes.items()}
    possible |= {index: {layout} for index, layout in (known or {}).items()}
    reached: set[int] = set()
    ragged: dict[int, list[int]] = {}
    if thorough:
        _nothing_comes_of_nothing(places, probe)
    reach = _Reach(probe)
    needed, more = separating_groups(batch, thorough)
    for count, examples in enumerate([*needed, *more]):
        if count >= len(needed) and all(len(possible[i]) == 1 for i in reached - ragged.keys()):
            break
        for index, entries in reach(examples, possible).items():
            if index in ragged or not bool(entries.any()):
                continue
            reached.add(index)
            possible[index] = consistent(possible[index], entries, examples)
            if not possible[index]:
                if index in (known or {}):
                    raise _refused(places.name(index), tuple(entries.shape), examples, batch)
                ragged[index] = examples
    found: dict[int, Layout | None] = {
        i: _simplest(possible[i]) if i in reached - ragged.keys() else None for i in possible
    }
    return found | _ragged(places, batch, reach, ragged)


def _nothing_comes_of_nothing(places: Places, probe: Probe) -> None:
    """Send zeros back.

    Raises:
        CoverageError: a gradient arrives that no loss has sent, so no example's clipping would bound it.
    """
    for index, entries in probe([], zero=True).items():
        if bool(entries.any()):
            raise CoverageError(
                f"{_capital(places.name(index))} receives a gradient that comes from no example's loss: a custom "
                "autograd function or a hook adds one of its own (an auxiliary loss over the batch, say).",
                fix="return every loss from loss_fn, per example, and add nothing to gradients on their way",
            )


def _capital(words: str) -> str:
    return words[0].upper() + words[1:]


class _Reach:
    """Which entries some examples' losses reach; entries that are NaN whatever is sent back do not count.

    Args:
        probe: sends NaN back.
    """

    def __init__(self, probe: Probe) -> None:
        self._probe = probe
        self._always: dict[int, Tensor] | None = None

    def __call__(self, examples: list[int], possible: Mapping[int, set[ExampleAxis]]) -> dict[int, Tensor]:
        """By index; entries that are always NaN are left out once they contradict every layout."""
        touched = {index: entries for index, entries in self._probe(examples).items() if index in possible}
        if all(consistent(possible[i], t, examples) for i, t in touched.items()):
            return touched
        return self.without_always(touched)

    def without_always(self, touched: dict[int, Tensor]) -> dict[int, Tensor]:
        """Leave out entries that are NaN in the forward already."""
        if self._always is None:
            self._always = self._probe([])
        return {i: t & ~self._always[i] if i in self._always else t for i, t in touched.items()}

    def alone(self, examples: list[int]) -> dict[int, Tensor]:
        """By index, without what is always NaN."""
        return self.without_always(self._probe(examples))


def _ragged(places: Places, batch: int, reach: _Reach, contradicted: Mapping[int, list[int]]) -> dict[int, Layout]:
    """Owners of rows that lie in no regular order, from two passes for each bit of the examples' indices.

    Every two examples differ in a bit; so an entry that only one of the two groups reaches, for every bit, is reached
    by one example alone.

    Args:
        places: the outputs.
        batch: B.
        reach: sends NaN back.
        contradicted: by index, the examples that left no regular layout.

    Raises:
        CoupledExamplesError: entries of every axis are reached by several examples, or such rows come straight from the
            data, so that nothing says whose they are.
    """
    if not contradicted:
        return {}
    passes = []
    for bit in range((batch - 1).bit_length()):
        groups = [[i for i in range(batch) if (i >> bit & 1) == value] for value in (1, 0)]
        passes.append([reach.alone(group) for group in groups])
    found: dict[int, Layout] = {}
    for index, examples in contradicted.items():
        nowhere = torch.zeros(places.shapes[index], dtype=torch.bool) if index in places.shapes else None
        bits = [(ones.get(index, nowhere), zeros.get(index, nowhere)) for ones, zeros in passes]
        device = next(t.device for pair in bits for t in pair if t is not nowhere and t is not None)
        pairs = [(a.to(device), b.to(device)) for a, b in bits if a is not None and b is not None]
        axes = range(pairs[0][0].dim())
        layout = next((x for x in (owners_from_bits(pairs, axis, batch) for axis in axes) if x is not None), None)
        if layout is None:
            raise _refused(places.name(index), tuple(pairs[0][0].shape), examples, batch)
        if places.is_source(index):
            raise _unanchored(places.name(index), tuple(pairs[0][0].shape))
        found[index] = layout
    return found


def separating_groups(batch: int, thorough: bool = True) -> tuple[list[list[int]], list[list[int]]]:
    """Groups of examples that must be sent back, and those that are only if layouts are still open."""
    needed = [[batch - 1], [0]]
    if thorough and batch > 2:
        for bit in range((batch - 1).bit_length()):
            chosen = [i for i in range(batch) if i >> bit & 1]
            needed += [chosen, [i for i in range(batch) if not i >> bit & 1]]
    return needed, [[i] for i in range(1, batch - 1)]


def with_axes(tape: Tape, axes: Mapping[int, Layout | None]) -> None:
    """Write the decided layouts into the tape's uses."""
    tape.uses = [replace(use, axis=axes.get(use.call.index)) for use in tape.uses]


Replaying = Callable[[], AbstractContextManager[None]]
"""A recorder's `replaying`, or several recorders' together."""


def run_backward(
    roots: Sequence[Tensor | GradientEdge],
    gradients: Sequence[Tensor],
    retain_graph: bool,
    replaying: Replaying | None = None,
    inputs: Sequence[GradientEdge] = (),
) -> Sequence[Tensor | None]:
    """A backward pass that torch functions do not see.

    Args:
        roots: where it starts.
        gradients: one for each root.
        retain_graph: whether another pass follows.
        replaying: if a checkpoint recomputes during the pass.
        inputs: if given, the gradients that arrive there are returned, and none is left in a leaf.
    """
    with nullcontext() if replaying is None else replaying():
        # torch.autograd.backward would hand itself to the active mode, which then sees nothing of the pass.
        found = torch.autograd.graph._engine_run_backward(
            tuple(roots),
            tuple(gradients),
            retain_graph,
            False,
            tuple(inputs),
            allow_unreachable=True,
            accumulate_grad=not inputs,
        )
    return found or ()


def send_back(
    tape: Tape,
    seeds: Sequence[Seed],
    examples: list[int] | None,
    zero: bool = False,
    replaying: Replaying | None = None,
) -> dict[int, Tensor]:
    """Send NaN back from the seeds, through the whole graph; a `Probe` once tape and seeds are given."""
    touched: dict[int, Tensor] = {}

    def sink(call: int, gradient: Tensor) -> None:
        entries = _something(gradient) if zero else gradient.isnan()
        touched[call] = touched[call] | entries if call in touched else entries

    edges = [seed.edge for seed in seeds]
    tape.sink = sink
    try:
        sent = [seed.nothing() if zero else seed.poison(examples) for seed in seeds]
        run_backward(edges, sent, True, replaying)
    finally:
        tape.sink = None
    return touched


def send_back_to(
    places: Mapping[int, GradientEdge],
    seeds: Sequence[Seed],
    examples: list[int] | None,
    zero: bool = False,
    replaying: Replaying | None = None,
) -> dict[int, Tensor]:
    """Send NaN back from the seeds only to the places of some calls; no leaf receives a gradient."""
    if not places:
        return {}
    found = run_backward(
        [seed.edge for seed in seeds],
        [seed.nothing() if zero else seed.poison(examples) for seed in seeds],
        True,
        replaying,
        list(places.values()),
    )
    arrived = [(call, gradient) for call, gradient in zip(places, found, strict=True) if gradient is not None]
    return {call: _something(gradient) if zero else gradient.isnan() for call, gradient in arrived}


def _something(gradient: Tensor) -> Tensor:
    """Entries that are not zero; NaN is what zero times infinity gives."""
    return (gradient != 0) & ~gradient.isnan()


def _simplest(layouts: set[ExampleAxis]) -> ExampleAxis:
    simplest = min(layouts, key=lambda layout: (layout.axis, layout.outer))
    return replace(simplest, certain=len(layouts) == 1)


def _unanchored(name: str, shape: tuple[int, ...]) -> CoupledExamplesError:
    return CoupledExamplesError(
        f"The rows of {name}, shape {shape}, lie in another order than the losses, and come straight from the data: "
        "nothing shows that the example of a loss is the example of its rows.",
        fix="declare the input before it is reordered (x = dither.batched(x)), keep the losses in the order of the "
        "examples, and let no hook move gradients from one example to another",
    )


def _refused(
    name: str, shape: tuple[int, ...], examples: list[int], batch: int
) -> CoupledExamplesError | ExampleAxisError:
    if not candidates(torch.Size(shape), batch):
        return ExampleAxisError(
            f"{_capital(name)}, shape {shape}, has no axis that {batch} examples fit on, and its rows are "
            "not each one example's.",
            fix="declare a constant input of this layer (dither.constant, or a buffer of the model), or keep one axis "
            "for the examples",
        )
    which = (
        f"Example {examples[0]}'s loss depends" if len(examples) == 1 else f"Losses of {len(examples)} examples depend"
    )
    return CoupledExamplesError(
        f"{which} on other examples through {name}, shape {shape}, with {batch} examples.",
        fix="remove what mixes examples (batch normalisation or statistics in the model or the loss: use group or "
        "layer normalisation), and declare a constant input of a layer: dither.constant(tensor), or a buffer",
    )
