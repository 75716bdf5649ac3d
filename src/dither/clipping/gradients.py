"""Per-example gradients of recordings by parameter, under a plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dither.capture.coverage import leaves_of
from dither.capture.uses import ParamUse
from dither.clipping.collectors import Added, Collector, Held, NotFormed, pull_back
from dither.clipping.functions import all_finite
from dither.clipping.plan import Plan, PlannedUse, choose
from dither.clipping.recording import Recorded


class Gradients:
    """Per-example gradients of a recording by parameter, under a plan.

    Args:
        recordings: the recorded forwards, of the same examples.
        strategy: one of dither.clipping.plan.STRATEGIES.
        memory_budget: bytes that held gradients may take; None for no bound.
    """

    def __init__(self, recordings: Sequence[Recorded], strategy: str, memory_budget: float | None) -> None:
        self._batch, self._device = recordings[0].batch, recordings[0].device
        self._parameters = {name: p for recording in recordings for name, p in recording.parameters.items()}
        self._names = {id(p): name for name, p in self._parameters.items()}
        uses = [use for recording in recordings for use in recording.tape.uses]
        self.collectors: dict[str, Collector] = {}
        self._leaves: dict[int, list[str]] = {}
        planned = []
        left = float("inf") if memory_budget is None else float(memory_budget)
        counts: dict[str, int] = {}
        for use in uses:
            for name in self._leaves_of(use):
                counts[name] = counts.get(name, 0) + 1
        for use in uses:
            direct = id(use.parameter) in self._names
            chosen = "form"
            if direct and counts[use.name] == 1 and use.axis is not None:
                chosen = choose(use, strategy, left)
                self.collectors[use.name] = Held(recordings[0].buffers) if chosen == "hold" else NotFormed(chosen)
            for name in self._leaves_of(use):
                self.collectors.setdefault(name, Added())
            held = 0 if use.axis is None or chosen in ("ghost", "tile") else int(use.rule.cost(use).held_bytes)
            left -= held
            planned.append(PlannedUse(use.name, use.call.name, chosen, held))
        self.plan = Plan(tuple(planned))
        self.complete = True
        """Whether every norm that was last given is finite."""

    def _leaves_of(self, use: ParamUse) -> list[str]:
        """Names of the parameters behind a use."""
        found = self._leaves.get(id(use.parameter))
        if found is None:
            own = self._names.get(id(use.parameter))
            reached = {id(leaf) for leaf in leaves_of(use.parameter)} if own is None else set()
            found = [own] if own is not None else [n for i, n in self._names.items() if i in reached]
            self._leaves[id(use.parameter)] = found
        return found

    def receive(self, use: ParamUse, grad_output: Tensor) -> None:
        """Hand an output gradient to the collectors of the parameters behind the use."""
        if id(use.parameter) in self._names:
            self.collectors[use.name].receive(use, grad_output)
            return
        names = self._leaves_of(use)
        gradients = use.rule.per_example_gradient(use, grad_output)
        with torch.enable_grad():
            pulled = pull_back(use.parameter, gradients, [self._parameters[n] for n in names])
        for name, gradient in zip(names, pulled, strict=True):
            collector = self.collectors[name]
            if gradient is not None and isinstance(collector, Added):
                collector.add(gradient)

    def is_formed(self, use: ParamUse) -> bool:
        """Whether a use's gradients are formed as they arrive, so that its inputs are not needed afterwards."""
        return not isinstance(self.collectors.get(use.name), NotFormed)

    def formed(self, name: str) -> Tensor | None:
        """A parameter's per-example gradients, (B, *shape); None if no gradient arrived."""
        collector = self.collectors.get(name)
        return None if collector is None else collector.formed()

    def squared_norms(self) -> dict[str, Tensor]:
        """Squared norms (B,) of every parameter that a gradient arrived at."""
        parts = {name: collector.squared_norm() for name, collector in self.collectors.items()}
        return {name: part for name, part in parts.items() if part is not None}

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
            gradients = collector.formed()
            if gradients is not None:
                again += gradients[examples].double().reshape(len(examples), -1).square().sum(1)
        squared[examples] = again

    def add_weighted_sum(self, weights: Tensor, into: Mapping[str, Tensor], dropped: Tensor | None = None) -> None:
        """Add the weighted sums; dropped examples' gradients (not finite) are replaced by zero, never multiplied."""
        cast: dict[torch.dtype, Tensor] = {}
        if dropped is not None and not bool(dropped.any()):
            dropped = None
        for name, collector in self.collectors.items():
            if dropped is None:
                dtype = into[name].dtype
                if dtype not in cast:  # once, not once a parameter
                    cast[dtype] = weights.to(torch.promote_types(dtype, torch.float32))
                collector.add_weighted_sum(cast[dtype], into[name])
                continue
            gradients = collector.formed()
            if gradients is not None:
                kept = Added()
                kept.add(gradients[~dropped])
                kept.add_weighted_sum(weights[~dropped], into[name])
