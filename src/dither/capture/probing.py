"""Gradients sent back on trial: NaN from some examples, or zeros, to see where they arrive."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from dither.capture.examples import Layout
from dither.capture.uses import Tape


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
        with nan_on_purpose():
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
    sent = [seed.nothing() if zero else seed.poison(examples) for seed in seeds]
    with nan_on_purpose():
        found = run_backward([seed.edge for seed in seeds], sent, True, replaying, list(places.values()))
    arrived = [(call, gradient) for call, gradient in zip(places, found, strict=True) if gradient is not None]
    return {call: _something(gradient) if zero else gradient.isnan() for call, gradient in arrived}


def nan_on_purpose() -> AbstractContextManager[None]:
    """Torch's anomaly detection takes no NaN for an error inside."""
    if torch.is_anomaly_enabled() and torch.is_anomaly_check_nan_enabled():
        quiet: AbstractContextManager[None] = torch.autograd.set_detect_anomaly(True, check_nan=False)
        return quiet
    return nullcontext()


def _something(gradient: Tensor) -> Tensor:
    """Entries that are not zero; NaN is what zero times infinity gives."""
    return (gradient != 0) & ~gradient.isnan()
