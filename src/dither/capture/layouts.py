"""Where the examples lie in every recorded output, and the proof that they do not influence each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from dither.capture.coverage import nodes_behind
from dither.capture.examples import ExampleAxis, Layout, candidates, consistent, owners_from_bits
from dither.capture.uses import Tape
from dither.errors import CoupledExamplesError, CoverageError, ExampleAxisError


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
            return not any(getattr(n, "variable", None) is anchor for n in nodes_behind(behind))

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
    tape.uses = [use.placed(axes.get(use.call.index)) for use in tape.uses]


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
            fix="declare a constant input of this layer (dither.constant, or a buffer of the model), also one that is "
            "made of a list inside (dither.constant(torch.tensor([...]))), or keep one axis for the examples",
        )
    which = (
        f"Example {examples[0]}'s loss depends" if len(examples) == 1 else f"Losses of {len(examples)} examples depend"
    )
    return CoupledExamplesError(
        f"{which} on other examples through {name}, shape {shape}, with {batch} examples.",
        fix="remove what mixes examples (batch normalisation or statistics in the model or the loss: use group or "
        "layer normalisation), and declare a constant input of a layer, also one that is made of a list inside: "
        "dither.constant(tensor), or a buffer",
    )
