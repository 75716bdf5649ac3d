"""Per-example gradients of recordings by parameter, under a plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dither.capture.coverage import leaves_of
from dither.capture.uses import ParamUse
from dither.clipping.buffers import Buffers
from dither.clipping.collectors import Added, Collector, Held, pull_back
from dither.clipping.expanded import expansion_of
from dither.clipping.functions import all_finite
from dither.clipping.machine import free_memory
from dither.clipping.one_by_one import Room
from dither.clipping.plan import Candidate, Plan, make_plan
from dither.clipping.recording import Recorded
from dither.clipping.unformed import Crossed, NotFormed
from dither.errors import CoverageError
from dither.precision import in_full_precision
from dither.rules.rule import at_least_float32


class Gradients:
    """Per-example gradients of a recording by parameter, under a plan.

    Args:
        recordings: the recorded forwards, of the same examples.
        strategy: one of dither.clipping.plan.STRATEGIES.
        memory_budget: bytes that held gradients may take; None for half of the free memory with "auto", else no bound.
    """

    def __init__(self, recordings: Sequence[Recorded], strategy: str, memory_budget: float | None) -> None:
        self._batch, self._device = recordings[0].batch, recordings[0].device
        self._parameters = {name: p for recording in recordings for name, p in recording.parameters.items()}
        self._names = {id(p): name for name, p in self._parameters.items()}
        uses = [use for recording in recordings for use in recording.tape.uses]
        self.collectors: dict[str, Collector] = {}
        self._leaves: dict[int, list[str]] = {}
        self.plan = recordings[0].planned(
            None if len(recordings) > 1 else (strategy, memory_budget, tuple(tuple(self._leaves_of(u)) for u in uses)),
            lambda: self._make_plan(uses, strategy, memory_budget),
        )
        room = Room()
        if memory_budget is not None and strategy != "hold":
            room = Room(memory_budget - sum(planned.held_bytes for planned in self.plan.uses), memory_budget)
        for use, planned in zip(uses, self.plan.uses, strict=True):
            for name in self._leaves_of(use):
                self.collectors.setdefault(name, _collector(planned.strategy, recordings[0].buffers, room))
        self.complete = True
        """Whether every norm that was last given is finite."""

    def _make_plan(self, uses: Sequence[ParamUse], strategy: str, memory_budget: float | None) -> Plan:
        budget = memory_budget
        if budget is None and strategy == "auto":
            budget = free_memory(self._device) / 2
        held = {n: float(self._batch * p.numel() * p.element_size()) for n, p in self._parameters.items()}
        return make_plan(self._candidates(uses), held, strategy, budget, memory_budget is not None, self._device)

    def _candidates(self, uses: Sequence[ParamUse]) -> list[Candidate]:
        found = []
        for use in uses:
            direct = id(use.parameter) in self._names
            crosses = direct and use.axis is not None and use.rule.crosses(use)
            found.append(Candidate(use, direct, tuple(self._leaves_of(use)), crosses))
        return found

    def _leaves_of(self, use: ParamUse) -> list[str]:
        """Names of the parameters behind a use."""
        found = self._leaves.get(id(use.parameter))
        if found is None:
            own = self._names.get(id(use.parameter))
            reached = {id(leaf) for leaf in leaves_of(use.parameter)} if own is None else set()
            found = [own] if own is not None else [n for i, n in self._names.items() if i in reached]
            self._leaves[id(use.parameter)] = found
        return found

    @in_full_precision
    def receive(self, use: ParamUse, grad_output: Tensor) -> None:
        """Hand an output gradient to the collectors of the parameters behind the use."""
        if id(use.parameter) in self._names:
            self.collectors[use.name].receive(use, grad_output)
            return
        names = self._leaves_of(use)
        leaves = [self._parameters[n] for n in names]
        expansion = expansion_of(use)
        if expansion is None:
            pulled = pull_back(use.parameter, use.rule.per_example_gradient(use, grad_output), leaves)
        else:
            gradients = expansion.per_example_gradient(use, grad_output).to(use.parameter.dtype)
            pulled = pull_back(expansion.base, gradients, leaves)
        for name, gradient in zip(names, pulled, strict=True):
            collector = self.collectors[name]
            if gradient is None:
                continue
            if not isinstance(collector, Added):  # a gradient that went nowhere would be missing from the norm
                raise CoverageError(
                    f"Parameter {name} was planned as {collector.strategy}, and is used through another tensor too.",
                    fix="report this model to dither; strategy='hold' may help meanwhile",
                )
            collector.add(gradient)

    def keeps_inputs(self, use: ParamUse) -> bool:
        """Whether a use's inputs are needed until the sum: its gradients were not formed as they arrived."""
        collector = self.collectors.get(use.name)
        return collector is not None and collector.keeps_inputs

    @in_full_precision
    def formed(self, name: str) -> Tensor | None:
        """A parameter's per-example gradients, (B, *shape); None if no gradient arrived."""
        collector = self.collectors.get(name)
        return None if collector is None else collector.formed()

    @in_full_precision
    def squared_norms(self) -> dict[str, Tensor]:
        """Squared norms (B,) of every parameter that a gradient arrived at."""
        parts = {name: collector.squared_norm() for name, collector in self.collectors.items()}
        return {name: part for name, part in parts.items() if part is not None}

    @in_full_precision
    def norms(self, widen: bool = True, squares: Mapping[str, Tensor] | None = None) -> Tensor:
        """Per-example norms over all parameters, (B,), float64.

        Args:
            widen: do again those whose squares overflow.
            squares: what `squared_norms` gave, if it is at hand.
        """
        parts = list((self.squared_norms() if squares is None else squares).values())
        if not parts:
            return torch.zeros(self._batch, dtype=torch.float64, device=self._device)
        squared = torch.stack(parts).clamp_min_(0).sum(0, dtype=torch.float64)
        self.complete = all_finite(squared)
        if widen and not self.complete:
            self._widen(squared)
            self.complete = all_finite(squared)
        return squared.sqrt_()

    def _widen(self, squared: Tensor) -> None:
        """Recompute the squared norms that are not finite from float64 gradients, in place."""
        examples = (~torch.isfinite(squared)).nonzero().flatten()
        again = torch.zeros_like(squared[examples])
        for collector in self.collectors.values():
            part = collector.wide_squared_norm(examples.tolist())
            if part is not None:
                again += part.to(again.device)
        squared[examples] = again

    @in_full_precision
    def add_weighted_sum(self, weights: Tensor, into: Mapping[str, Tensor], dropped: Tensor | None = None) -> None:
        """Add the weighted sums; dropped examples' gradients (not finite) are replaced by zero, never multiplied.

        Into tensors of float32 or wider: what is added up in half precision moves by more than the bound.
        """
        cast: dict[torch.dtype, Tensor] = {}
        if dropped is not None and not bool(dropped.any()):
            dropped = None
        for name, collector in self.collectors.items():
            dtype = into[name].dtype
            if dtype not in cast:  # once, not once a parameter
                cast[dtype] = weights.to(at_least_float32(dtype))
            collector.add_weighted_sum(cast[dtype], into[name], dropped)


def _collector(strategy: str, buffers: Buffers, room: Room) -> Collector:
    if strategy == "hold":
        return Held(buffers)
    if strategy == "cross":
        return Crossed(room)
    return Added() if strategy == "form" else NotFormed(strategy, room)
