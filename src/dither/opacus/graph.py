"""From a loss back to the recorded forward passes behind it.

The outputs of a recorded forward, and of every recorded operation, are marked at their graph nodes. Walking from a loss
over unmarked nodes gives the frontier: the marked places that the loss reads first. Behind it lie the recordings.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from dither.capture.coverage import Seed
from dither.capture.examples import ExampleAxis

_MARK = "dither"


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

    def seed(self, edge: GradientEdge, layout: ExampleAxis) -> Seed:
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
        structure: hash of the graph's node names, in the order of the walk.
    """

    frontier: list[tuple[GradientEdge, Place]] = field(default_factory=list)
    owners: list[Any] = field(default_factory=list)
    calls: dict[int, dict[int, GradientEdge]] = field(default_factory=dict)
    leaves: list[Tensor] = field(default_factory=list)
    structure: int = 0


def mark(tensor: Tensor, owner: Any, call: int | None = None) -> None:
    """Mark a tensor's place in the graph, as a module's output or as a recorded operation's."""
    edge = get_gradient_edge(tensor)
    node: Any = edge.node
    marks: dict[tuple[int, bool], Place] = node.metadata.setdefault(_MARK, {})
    marks[edge.output_nr, call is None] = Place(owner, call, tensor.shape, tensor.dtype, tensor.device)


def reach(roots: Sequence[Tensor]) -> Reached:
    """Walk the graph behind the roots, first up to the frontier, then on."""
    found, names = Reached(), [""]
    seen: set[_Node] = set()
    crossed: list[tuple[_Node, int]] = []
    edges = [get_gradient_edge(root) for root in roots if root.requires_grad]
    _walk([(edge.node, edge.output_nr) for edge in edges], seen, names, found, crossed)
    _walk(crossed, seen, names, found, None)
    found.structure = hash(tuple(names))
    return found


def _walk(
    stack: list[tuple[Any, int]],
    seen: set[_Node],
    names: list[str],
    found: Reached,
    crossed: list[tuple[_Node, int]] | None,
) -> None:
    """Depth first; with `crossed`, stop at marked places and list them there."""
    while stack:
        node, output = stack.pop()
        marks: dict[tuple[int, bool], Place] = node.metadata.get(_MARK, {})
        place = marks.get((output, True)) or marks.get((output, False))
        if place is not None and crossed is not None:
            if (node, output) not in crossed:
                found.frontier.append((GradientEdge(node, output), place))
                crossed.append((node, output))
            continue
        if node in seen:
            continue
        seen.add(node)
        names.append(node.name())
        for (number, _), marked in marks.items():
            if not any(marked.owner is owner for owner in found.owners):
                found.owners.append(marked.owner)
            if marked.call is not None:
                found.calls.setdefault(id(marked.owner), {})[marked.call] = GradientEdge(node, number)
        variable = getattr(node, "variable", None)
        if isinstance(variable, Tensor):
            found.leaves.append(variable)
        stack.extend((parent, number) for parent, number in node.next_functions if parent is not None)


def coupled_by(roots: Sequence[Tensor], seeds: Sequence[Seed], groups: Iterable[list[int]]) -> list[int] | None:
    """Whether a loss couples the examples of the tensors that it reads.

    A loss is a sum of one term per example exactly if its derivative by one example's entries does not depend on
    another example's entries. The derivative is taken with its own graph, and NaN is sent through that.

    Args:
        roots: losses.
        seeds: the places that the losses read.
        groups: groups of examples to separate from the rest.

    Returns:
        A group that depends on an example outside of it, or None.
    """
    edges = [seed.edge for seed in seeds]
    total = torch.stack([root.sum() for root in roots if root.requires_grad]).sum()
    with torch.enable_grad():
        derivatives = torch.autograd.grad(total, edges, create_graph=True, allow_unused=True)
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
