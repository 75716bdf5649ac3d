"""From a loss back to the recorded forward passes behind it.

The outputs of a recorded forward, and of every recorded operation, are marked at their graph nodes. Walking from a loss
over unmarked nodes gives the frontier: the marked places that the loss reads first. Behind it lie the recordings.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from dither.capture.custom import is_custom
from dither.capture.examples import Layout
from dither.capture.probing import Replaying, Seed

_MARK = "dither"
_PICKS = ("Index", "Gather", "Scatter", "Take", "Masked", "Sort", "Topk", "Put", "Repeat", "Unique")
"""In the names of graph nodes whose operation picks entries by a tensor of indices or a mask."""


@dataclass(frozen=True)
class Place:
    """A marked output.

    Attributes:
        owner: the recording that made it.
        call: index of the recorded operation that made it, or None for an output of the module.
        shape: its shape.
        dtype: its dtype.
        device: its device.
    """

    owner: Any
    call: int | None
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    def seed(self, edge: GradientEdge, layout: Layout) -> Seed:
        """The place as a seed whose layout is known."""
        return Seed(edge, torch.empty(1, dtype=self.dtype, device=self.device).expand(self.shape), layout)


class _Node(Protocol):
    """What is used of autograd's nodes."""

    metadata: dict[str, Any]
    next_functions: tuple[tuple[Any, int], ...]

    def name(self) -> str: ...


@dataclass
class Reached:
    """What lies behind some roots.

    Attributes:
        frontier: marked places that the roots read without passing another marked place.
        owners: every recording behind the roots.
        calls: the place of every recorded operation, by recording (its id) and call index.
        leaves: every leaf that autograd itself would give a gradient.
        structure: hash of the graph: its nodes and what feeds them; before the frontier also their options.
        kind: hash of the names of the nodes before the frontier.
        loss: nodes before the frontier, what the roots compute from what they read.
        volatile: whether the loss picks entries by an index tensor, or has a custom autograd function, so that an equal
            structure may mean another loss.
    """

    frontier: list[tuple[GradientEdge, Place]] = field(default_factory=list)
    owners: list[Any] = field(default_factory=list)
    calls: dict[int, dict[int, GradientEdge]] = field(default_factory=dict)
    leaves: list[Tensor] = field(default_factory=list)
    structure: int = 0
    kind: int = 0
    loss: list[Any] = field(default_factory=list)
    volatile: bool = False

    @property
    def replaying(self) -> Replaying | None:
        """What must be entered for a backward pass, if checkpoints recompute parts of a recording in it."""
        each = [owner.replaying for owner in self.owners if owner.replaying is not None]
        return partial(_together, each) if each else None


@contextmanager
def _together(each: Sequence[Replaying]) -> Iterator[None]:
    with ExitStack() as stack:
        for replaying in each:
            stack.enter_context(replaying())
        yield


def mark(tensor: Tensor, owner: Any, call: int | None = None) -> None:
    """Mark a tensor's place in the graph, as a module's output or as a recorded operation's."""
    edge = get_gradient_edge(tensor)
    node: Any = edge.node
    marks: dict[tuple[int, bool], Place] = node.metadata.setdefault(_MARK, {})
    marks[edge.output_nr, call is None] = Place(owner, call, tensor.shape, tensor.dtype, tensor.device)


def reach(roots: Sequence[Tensor]) -> Reached:
    """Walk the graph behind the roots, first up to the frontier, then on."""
    found = Reached()
    order: dict[Any, Any] = {}
    crossed: dict[tuple[Any, int], Place] = {}
    edges = [get_gradient_edge(root) for root in roots if root.requires_grad]
    _walk([(edge.node, edge.output_nr) for edge in edges], order, found, crossed)
    found.loss = list(order)
    found.kind = hash(tuple(node.name() for node in order))
    found.volatile = any(is_custom(node) or any(word in node.name() for word in _PICKS) for node in order)
    found.frontier = [(GradientEdge(node, output), place) for (node, output), place in crossed.items()]
    _walk(list(crossed), order, found, None)
    numbers = {node: number for number, node in enumerate(order)}
    wiring = tuple(
        (node.name(), options, tuple((numbers.get(parent), output) for parent, output in node.next_functions))
        for node, options in order.items()
    )
    found.structure = hash(wiring)
    return found


def _walk(
    stack: list[tuple[Any, int]], order: dict[Any, Any], found: Reached, crossed: dict[tuple[Any, int], Place] | None
) -> None:
    """Depth first; with `crossed`, stop at marked places and list them there, and note the nodes' options."""
    while stack:
        node, output = stack.pop()
        marks: dict[tuple[int, bool], Place] = node.metadata.get(_MARK, {})
        place = marks.get((output, True)) or marks.get((output, False))
        if place is not None and crossed is not None:
            crossed.setdefault((node, output), place)
            continue
        if node in order:
            continue
        order[node] = None if crossed is None else _options(node)
        for (number, _), marked in marks.items():
            if not any(marked.owner is owner for owner in found.owners):
                found.owners.append(marked.owner)
            if marked.call is not None:
                found.calls.setdefault(id(marked.owner), {})[marked.call] = GradientEdge(node, number)
        variable = getattr(node, "variable", None)
        if isinstance(variable, Tensor):
            found.leaves.append(variable)
        stack.extend((parent, number) for parent, number in node.next_functions if parent is not None)


_option_names: dict[str, list[str]] = {}


def _options(node: Any) -> tuple[Any, ...]:
    """What a node keeps of its operation's axes, sizes and flags; not its tensors and not its numbers."""
    names = _option_names.get(node.name())
    if names is None:
        kept = [name for name in dir(node) if name.startswith("_saved_")]
        names = _option_names[node.name()] = [name for name in kept if _is_option(getattr(node, name, None))]
    return tuple(getattr(node, name, None) for name in names)


def _is_option(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_is_option(item) for item in value)
    return isinstance(value, (bool, int, str))
