"""Opacus's optimizers: an example whose gradient is not finite is left out, and batched sums replace einsum.

Legend: B examples.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import opacus.optimizers as stock
import torch
from opacus.optimizers.ddp_perlayeroptimizer import SimpleDistributedPerLayerOptimizer as _StockSimplePerLayer
from opacus.optimizers.ddpoptimizer_fast_gradient_clipping import (
    DistributedDPOptimizerFastGradientClipping as _StockDistributedFast,
)
from torch import Tensor

from dither.opacus import provenance
from dither.rules.rule import add_weighted, squared_rows

_stock_accumulate = stock.DPOptimizerFastGradientClipping.accumulate
_stock_fast_zero_grad = stock.DPOptimizerFastGradientClipping.zero_grad


class DPOptimizer(stock.DPOptimizer):
    """Clips `.grad_sample`, adds noise, steps; see `opacus.optimizers.DPOptimizer`."""

    max_grad_norm: Any
    bound_of_the_sum = 0.0
    """The largest bound of what was summed since the last noise."""

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

    def add_noise(self) -> None:
        """Add noise for the largest bound that a part of the sum was clipped at: a schedule may lower it in between."""
        with _at_the_largest_bound(self):
            super().add_noise()


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
        for parameter in self.params:
            if not hasattr(parameter, "summed_grad"):
                parameter.summed_grad = None
        _stock_accumulate(self)
        provenance.forget(self.params)

    def add_noise(self) -> None:
        """As `DPOptimizer`."""
        with _at_the_largest_bound(self):
            super().add_noise()

    def zero_grad(self, set_to_none: bool = False) -> None:
        """Clear `.grad`, and `summed_grad` unless a skipped step holds it."""
        _stock_fast_zero_grad(self, set_to_none)
        provenance.cleared(self.params)
        self._batches = 1


class DistributedDPOptimizerFastGradientClipping(DPOptimizerFastGradientClipping, _StockDistributedFast):
    """Sums over ranks, noise on the first; see Opacus's class of this name."""


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


def add_clipped(parameters: Sequence[Any], batches: list[list[Tensor]], max_grad_norm: Any) -> Tensor:
    """Add clipped gradients to `summed_grad` and mark them as used.

    Args:
        parameters: clipped together.
        batches: for each batch, the parameters' per-example gradients (B, *shape).
        max_grad_norm: the bound.

    Returns:
        The clip factor of every example of every batch; zero where the gradient is not finite.
    """
    found = []
    sums = [torch.zeros_like(p, requires_grad=False) for p in parameters]
    for batch in batches:
        factors = clip_factors(batch, max_grad_norm)
        found.append(factors)
        finite = factors > 0
        whole = bool(finite.all())
        for total, sample in zip(sums, batch, strict=True):
            if len(sample) and not _is_zero(sample):
                weights = factors.to(sample.device)
                rows, weights = (sample, weights) if whole else (sample[finite], weights[finite])
                add_weighted(rows.to(total.dtype), weights, total)
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
