"""Proofs that nothing escapes: every parameter gradient passes the recorder, every loss is one example's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils.checkpoint import CheckpointError

from dither.capture.custom import CustomNodes
from dither.errors import CoverageError, LossShapeError


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
    return nodes_behind([root.grad_fn for root in roots], accounted)


def nodes_behind(nodes: Sequence[Any], accounted: Callable[[Any], set[int]] = lambda node: set()) -> Iterator[Any]:
    """The nodes and every node behind them, each once."""
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
    def behind(losses: Tensor, parameters: Mapping[str, Tensor], custom: CustomNodes) -> Leaves:
        """Find them, and put the uses of custom autograd functions on the tape.

        Args:
            losses: (B,).
            parameters: by name.
            custom: adopts nodes.

        Raises:
            CoverageError: a parameter is reached by autograd around the recorder.
        """
        names = {id(p): name for name, p in parameters.items()}
        adopted: set[Any] = set()

        def accounted(node: Any) -> set[int]:
            edges = custom.adopt(node)
            adopted.update(node.next_functions[edge][0] for edge in edges)
            return edges

        others = []
        for node in list(nodes_of([losses], accounted)):
            if type(node).__name__ == "AccumulateGrad":
                leaf = node.variable
                if id(leaf) in names:
                    raise _escaped(names[id(leaf)])
                if hasattr(leaf, "of_a_recording") and leaf is not custom.anchor:
                    raise _stale()
                others.append(leaf)
        given = [custom.targets[node][0] for node in adopted]
        behind = {id(leaf) for tensor in given for leaf in leaves_of(tensor)} | {id(tensor) for tensor in given}
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
