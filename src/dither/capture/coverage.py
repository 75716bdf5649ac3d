"""Proofs that nothing escapes: every parameter gradient passes the recorder, every loss is one example's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils.checkpoint import CheckpointError

from dither.capture.examples import ExampleAxis, candidates, consistent
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
    leaves, stack, seen = [], [root.grad_fn for root in roots], set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if isinstance(variable, Tensor):
            leaves.append(variable)
        stack.extend(parent for parent, _ in node.next_functions)
    return leaves


@contextmanager
def nothing_escapes(losses: Tensor, parameters: Mapping[str, Tensor]) -> Iterator[None]:
    """Run backward passes inside; no parameter may receive a gradient, and no leaf's `.grad` is left changed.

    Raises:
        CoverageError: a parameter is reached by autograd around the recorder.
    """
    names = {id(p): name for name, p in parameters.items()}
    others = []
    for leaf in leaves_of(losses):
        if id(leaf) in names:
            raise _escaped(names[id(leaf)])
        others.append((leaf, leaf.grad))
    for leaf, _ in others:
        leaf.grad = None
    try:
        with untouched(parameters):
            yield
    finally:
        for leaf, grad in others:
            leaf.grad = grad


@contextmanager
def untouched(parameters: Mapping[str, Tensor]) -> Iterator[None]:
    """Run backward passes inside; no parameter may receive a gradient by itself, and each `.grad` is left as it was.

    Raises:
        CoverageError: one did, or an activation checkpoint recomputes what was recorded.
    """
    before = {name: p.grad for name, p in parameters.items()}
    for parameter in parameters.values():
        parameter.grad = None
    try:
        yield
        for name, parameter in parameters.items():
            if parameter.grad is not None:
                raise _escaped(name)
    except CheckpointError as error:
        raise checkpoint_escapes() from error
    finally:
        for name, parameter in parameters.items():
            parameter.grad = before[name]


def checkpoint_escapes() -> CoverageError:
    """The refusal of activation checkpoints."""
    return CoverageError(
        "An activation checkpoint recomputes its layers outside the recorder: their gradients would escape.",
        fix="turn activation checkpointing off; flash clipping (strategy='two_pass') and smaller micro-batches save "
        "memory too",
    )


def _escaped(name: str) -> CoverageError:
    return CoverageError(
        f"Parameter {name} receives gradient outside the recorder, so it would not be clipped.",
        fix="use it through torch operations while loss_fn runs (not in a custom autograd.Function, a C++ extension, "
        "an activation checkpoint, or an output computed before), and let each example's loss depend on it",
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
    layout: ExampleAxis

    @staticmethod
    def of(tensor: Tensor, layout: ExampleAxis) -> Seed:
        """The seed at a tensor that requires grad."""
        return Seed(get_gradient_edge(tensor), tensor.detach(), layout)

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
    """

    shapes: Mapping[int, torch.Size]
    name: Callable[[int], str]

    @staticmethod
    def of(tape: Tape) -> Places:
        """The first output of every recorded operation, by the operation's index."""
        shapes = {c.index: c.output_shapes[0] for c in tape.calls if c.output_shapes}
        return Places(shapes, partial(_operation, tape))


def _operation(tape: Tape, index: int) -> str:
    if index < 0:
        return "an input of the module"
    names = ", ".join(use.name for use in tape.uses if use.call.index == index)
    return f"the output of {tape.calls[index].name} (parameter {names})"


Probe = Callable[[list[int] | None], dict[int, Tensor]]
"""Sends NaN back from some examples (None: from all) and tells, by call index, which entries of the output it reached:
bool, the output's shape."""


def decide_examples(
    places: Places, batch: int, probe: Probe, thorough: bool = True, known: Mapping[int, ExampleAxis] | None = None
) -> dict[int, ExampleAxis | None]:
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
    poisoned: dict[int, Tensor] | None = None
    needed, more = separating_groups(batch, thorough)
    for count, examples in enumerate([*needed, *more]):
        if count >= len(needed) and all(len(possible[i]) == 1 for i in reached):
            break
        touched = {index: entries for index, entries in probe(examples).items() if index in possible}
        left = {i: consistent(possible[i], t, examples) for i, t in touched.items()}
        if not all(left.values()):
            poisoned = probe([]) if poisoned is None else poisoned
            touched = {i: t & ~poisoned[i] if i in poisoned else t for i, t in touched.items()}
            left = {i: consistent(possible[i], t, examples) for i, t in touched.items()}
        for index, entries in touched.items():
            if not bool(entries.any()):
                continue
            reached.add(index)
            possible[index] = left[index]
            if not possible[index]:
                raise _refused(places.name(index), tuple(entries.shape), examples, batch)
    return {i: _simplest(possible[i]) if i in reached else None for i in possible}


def separating_groups(batch: int, thorough: bool = True) -> tuple[list[list[int]], list[list[int]]]:
    """Groups of examples that must be sent back, and those that are only if layouts are still open."""
    needed = [[batch - 1], [0]]
    if thorough and batch > 2:
        for bit in range((batch - 1).bit_length()):
            chosen = [i for i in range(batch) if i >> bit & 1]
            needed += [chosen, [i for i in range(batch) if not i >> bit & 1]]
    return needed, [[i] for i in range(1, batch - 1)]


def with_axes(tape: Tape, axes: Mapping[int, ExampleAxis | None]) -> None:
    """Write the decided layouts into the tape's uses."""
    tape.uses = [replace(use, axis=axes.get(use.call.index)) for use in tape.uses]


def send_back(tape: Tape, seeds: Sequence[Seed], examples: list[int] | None) -> dict[int, Tensor]:
    """Send NaN back from the seeds, through the whole graph; a `Probe` once tape and seeds are given."""
    touched: dict[int, Tensor] = {}

    def sink(call: int, output: int, gradient: Tensor) -> None:
        if output == 0:
            entries = gradient.isnan()
            touched[call] = touched[call] | entries if call in touched else entries

    edges = [seed.edge for seed in seeds]
    tape.sink = sink
    try:
        torch.autograd.backward(edges, [seed.poison(examples) for seed in seeds], retain_graph=True)
    finally:
        tape.sink = None
    return touched


def send_back_to(
    places: Mapping[int, GradientEdge], seeds: Sequence[Seed], examples: list[int] | None
) -> dict[int, Tensor]:
    """Send NaN back from the seeds only to the places of some calls; no leaf receives a gradient."""
    found = torch.autograd.grad(
        [seed.edge for seed in seeds],
        list(places.values()),
        [seed.poison(examples) for seed in seeds],
        retain_graph=True,
        allow_unused=True,
    )
    return {call: gradient.isnan() for call, gradient in zip(places, found, strict=True) if gradient is not None}


def _simplest(layouts: set[ExampleAxis]) -> ExampleAxis:
    return min(layouts, key=lambda layout: (layout.axis, layout.outer))


def _refused(
    name: str, shape: tuple[int, ...], examples: list[int], batch: int
) -> CoupledExamplesError | ExampleAxisError:
    if not candidates(torch.Size(shape), batch):
        return ExampleAxisError(
            f"{name[0].upper()}{name[1:]}, shape {shape}, has no axis that {batch} examples fit on.",
            fix="make a constant input of this layer a buffer of the model, or keep one axis for the examples",
        )
    which = (
        f"Example {examples[0]}'s loss depends" if len(examples) == 1 else f"Losses of {len(examples)} examples depend"
    )
    return CoupledExamplesError(
        f"{which} on other examples, or on rows in no regular order, through {name}, shape {shape}, with {batch} "
        "examples.",
        fix="remove what mixes examples (batch normalisation or statistics in the model or the loss: use group or "
        "layer normalisation), keep each example's rows together, and make a layer's constant input a buffer",
    )
