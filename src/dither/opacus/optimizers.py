"""Opacus's optimizers: an example whose gradient is not finite is left out, and batched sums replace einsum.

Legend: B examples.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import opacus.optimizers as stock
import torch
from opacus.optimizers.ddp_perlayeroptimizer import SimpleDistributedPerLayerOptimizer as _StockSimplePerLayer
from opacus.optimizers.ddpoptimizer_fast_gradient_clipping import (
    DistributedDPOptimizerFastGradientClipping as _StockDistributedFast,
)
from torch import Tensor, nn

from dither.opacus import provenance
from dither.precision import in_full_precision
from dither.rules.rule import add_weighted, at_least_float32, squared_rows

_stock_fast_zero_grad = stock.DPOptimizerFastGradientClipping.zero_grad


class _StandIn(nn.Parameter):
    """A parameter of float32 without memory, of the shape of one in half precision: torch lets no `.grad` be wider.

    Args:
        parameter: in half precision; `summed_grad` is float32.
    """

    _rounded: Any
    _version_given: int
    summed_grad: Any
    grad_sample: Any

    def __new__(cls, parameter: Any) -> _StandIn:
        like = torch.empty((), dtype=at_least_float32(parameter.dtype), device=parameter.device)
        made: _StandIn = super().__new__(cls, like.expand(parameter.shape))
        made._rounded, made._version_given = None, 0
        return made

    def begin(self, parameter: Any) -> None:
        """Stand for the parameter; a `.grad` that somebody changed since `end` is taken as it is."""
        self.summed_grad, self.grad_sample = parameter.summed_grad, getattr(parameter, "grad_sample", None)
        given = parameter.grad
        if given is None or given is not self._rounded or given._version != self._version_given:
            self.grad = None if given is None else given.to(self.dtype)

    def end(self, parameter: Any) -> None:
        """Give the parameter the rounded `.grad`."""
        self._rounded = parameter.grad = None if self.grad is None else self.grad.to(parameter.dtype)
        self._version_given = 0 if self._rounded is None else self._rounded._version


class DPOptimizer(stock.DPOptimizer):
    """Clips `.grad_sample`, adds noise, steps; see `opacus.optimizers.DPOptimizer`."""

    max_grad_norm: Any
    bound_of_the_sum = 0.0
    """The largest bound of what was summed since the last noise."""
    _stand_ins: Mapping[Any, _StandIn] = MappingProxyType({})
    _standing_in = False

    def pre_step(self, closure: Any = None) -> Any:
        """As Opacus's; a frozen parameter with an old gradient, which nobody clipped, takes no step with it."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if not parameter.requires_grad:
                    parameter.grad = None
        return super().pre_step(closure)

    def clip_and_accumulate(self) -> None:
        """Add the sum over examples of clipped gradients to every `summed_grad`.

        Guarantee: adding or removing one example changes the sum by at most max_grad_norm in L2 norm. An example whose
        gradient is not finite contributes nothing.
        """
        self._add_clipped()

    def _add_clipped(self) -> Tensor:
        """As `clip_and_accumulate`; returns the clip factor of every example."""
        if not self.params:
            return torch.empty(0)
        factors = add_clipped(self.params, entries_of(self.params), self.max_grad_norm)
        self.bound_of_the_sum = max(self.bound_of_the_sum, float(self.max_grad_norm))
        return factors

    @property
    def params(self) -> list[Any]:
        """The trained parameters; in `_at_full_precision`, what stands in for those in half precision."""
        found: list[Any] = super().params
        return [self._stand_ins.get(p, p) for p in found] if self._standing_in else found

    def add_noise(self) -> None:
        """Add noise for the largest bound that a part of the sum was clipped at: a schedule may lower it in between."""
        with self._taking_noise():
            super().add_noise()

    def scale_grad(self) -> None:
        """As Opacus's; `.grad` is rounded to its parameter's dtype afterwards."""
        with self._at_full_precision():
            super().scale_grad()

    @contextmanager
    def _taking_noise(self) -> Iterator[None]:
        """The bound is the largest, and `.grad` at least float32."""
        self._stand_ins = {p: _StandIn(p) for p in self.params if p.dtype != at_least_float32(p.dtype)}
        with _at_the_largest_bound(self), self._at_full_precision():
            yield

    @contextmanager
    def _at_full_precision(self) -> Iterator[None]:
        """Inside, `.grad` of a parameter in half precision is float32; outside it is rounded."""
        for parameter, stand_in in self._stand_ins.items():
            stand_in.begin(parameter)
        self._standing_in = True
        try:
            yield
        finally:
            self._standing_in = False
        for parameter, stand_in in self._stand_ins.items():
            stand_in.end(parameter)


class AdaClipDPOptimizer(DPOptimizer, stock.AdaClipDPOptimizer):
    """Adaptive clipping; see `opacus.optimizers.AdaClipDPOptimizer`."""

    def clip_and_accumulate(self) -> None:
        """As `DPOptimizer`; counts the examples that were not clipped, for the next bound."""
        factors = self._add_clipped()
        self.sample_size += len(factors)
        self.unclipped_num += len(factors) - (factors < 1).sum()


class DPPerLayerOptimizer(DPOptimizer, stock.DPPerLayerOptimizer):
    """Clips each parameter by its own bound; see `opacus.optimizers.DPPerLayerOptimizer`."""

    def clip_and_accumulate(self) -> None:
        """Each parameter's gradients to norm at most its own bound.

        Guarantee: the L2 sensitivity over all parameters is the root of the sum of squared bounds.
        """
        for parameter, bound in zip(self.params, self.max_grad_norms, strict=True):
            add_clipped([parameter], entries_of([parameter]), bound)


class DistributedDPOptimizer(DPOptimizer, stock.DistributedDPOptimizer):
    """Sums over ranks, noise on the first; see `opacus.optimizers.DistributedDPOptimizer`."""

    def reduce_gradients(self) -> None:
        """Sum over ranks before rounding: only the first has noise."""
        with self._at_full_precision():
            super().reduce_gradients()


class SimpleDistributedPerLayerOptimizer(DPPerLayerOptimizer, DistributedDPOptimizer, _StockSimplePerLayer):
    """Both of its bases."""


class DPOptimizerFastGradientClipping(stock.DPOptimizerFastGradientClipping, DPOptimizer):
    """Adds noise to gradients that flash clipping summed; see `opacus.optimizers.DPOptimizerFastGradientClipping`."""

    _batches = 1

    @property
    def accumulated_iterations(self) -> int:
        """Number of batches whose clipped sums the next step, or the one under way, takes."""
        return max(1, provenance.clipped_sums(self.params), self._batches)

    def accumulate(self) -> None:
        """Take the clipped sums from `.grad`.

        Raises:
            CoverageError: a gradient was not clipped.
        """
        provenance.check(self.params)
        self._batches = max(1, provenance.clipped_sums(self.params))
        totals = provenance.totals_of(self.params)
        for parameter in self.params:
            before, total = getattr(parameter, "summed_grad", None), totals.get(parameter)
            if total is None:
                total = parameter.grad.data.to(at_least_float32(parameter.dtype))
            parameter.summed_grad = total.clone() if before is None else before.add_(total)
        provenance.forget(self.params)

    def add_noise(self) -> None:
        """As `DPOptimizer`."""
        with self._taking_noise():
            super().add_noise()

    def zero_grad(self, set_to_none: bool = False) -> None:
        """Clear `.grad`, and `summed_grad` unless a skipped step holds it."""
        _stock_fast_zero_grad(self, set_to_none)
        provenance.cleared(self.params)
        self._batches = 1


class DistributedDPOptimizerFastGradientClipping(DPOptimizerFastGradientClipping, _StockDistributedFast):
    """Sums over ranks, noise on the first; see Opacus's class of this name."""

    def reduce_gradients(self) -> None:
        """As `DistributedDPOptimizer`."""
        with self._at_full_precision():
            super().reduce_gradients()


@contextmanager
def _at_the_largest_bound(optimizer: Any) -> Iterator[None]:
    """The optimizer's bound is no smaller inside than any that a part of its sum was clipped at."""
    now = optimizer.max_grad_norm
    optimizer.max_grad_norm = max(now, optimizer.bound_of_the_sum)
    try:
        yield
    finally:
        optimizer.max_grad_norm, optimizer.bound_of_the_sum = now, 0.0


def entries_of(parameters: Sequence[Any]) -> list[list[Tensor]]:
    """For every batch since the last step, the parameters' per-example gradients.

    Raises:
        ValueError: a parameter has none, they were used before, or the parameters disagree on the number of batches.
    """
    columns = []
    for parameter in parameters:
        if not hasattr(parameter, "grad_sample"):
            raise ValueError("Per sample gradient not found. Are you using GradSampleModule?")
        sample = parameter.grad_sample
        if sample is None:
            raise ValueError("Per sample gradient is not initialized. Not updated in backward pass?")
        if not isinstance(sample, (Tensor, list)):
            raise ValueError(f"Unexpected grad_sample type: {type(sample)}")
        entries = sample if isinstance(sample, list) else [sample]
        if any(hasattr(entry, "_processed") for entry in entries):
            raise ValueError(
                "Gradients haven't been cleared since the last optimizer step. "
                "In order to obtain privacy guarantees you must call optimizer.zero_grad() on each step"
            )
        columns.append(entries)
    if len({len(entries) for entries in columns}) > 1:
        raise ValueError("Number of accumulated steps is inconsistent across parameters")
    return [list(row) for row in zip(*columns, strict=True)]


@in_full_precision
def add_clipped(parameters: Sequence[Any], batches: list[list[Tensor]], max_grad_norm: Any) -> Tensor:
    """Add clipped gradients to `summed_grad`, float32 or wider, and mark them as used.

    Args:
        parameters: clipped together.
        batches: for each batch, the parameters' per-example gradients (B, *shape).
        max_grad_norm: the bound.

    Returns:
        The clip factor of every example of every batch; zero where the gradient is not finite.
    """
    found = []
    sums = [torch.zeros_like(p, requires_grad=False, dtype=at_least_float32(p.dtype)) for p in parameters]
    for batch in batches:
        factors = clip_factors(batch, max_grad_norm)
        found.append(factors)
        finite = factors > 0
        whole = bool(finite.all())
        for total, sample in zip(sums, batch, strict=True):
            if len(sample) and not _is_zero(sample):
                weights = factors.to(sample.device)
                rows, weights = (sample, weights) if whole else (sample[finite], weights[finite])
                add_weighted(rows, weights, total)
            vars(sample)["_processed"] = True
    for parameter, total in zip(parameters, sums, strict=True):
        before = getattr(parameter, "summed_grad", None)
        parameter.summed_grad = total if before is None else before.add_(total)
    return torch.cat(found)


def clip_factors(batch: Sequence[Tensor], max_grad_norm: Any) -> Tensor:
    """min(1, C / (norm + 1e-6)), (B,); zero where the norm is not finite (Abadi et al. 2016, algorithm 1)."""
    device = batch[0].device
    squares = torch.zeros(len(batch[0]), dtype=torch.float64, device=device)
    for sample in batch:
        if len(sample) and not _is_zero(sample):
            squares += squared_rows(sample).to(device)
    if not bool(torch.isfinite(squares).all()):
        squares = sum((s.double().flatten(1).square().sum(1).to(device) for s in batch), torch.zeros_like(squares))
    norms = squares.sqrt()
    factors = (max_grad_norm / (norms + 1e-6)).clamp(max=1.0)
    return torch.where(torch.isfinite(norms), factors, 0.0)


def _is_zero(sample: Tensor) -> bool:
    """Whether it is the memory-free zero of a parameter that no loss reached."""
    return sample.numel() > 1 and not any(sample.stride()) and float(sample[(0,) * sample.dim()]) == 0.0
