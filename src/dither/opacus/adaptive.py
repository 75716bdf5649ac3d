"""Opacus's adaptive clipping in ghost mode: the bound follows a quantile of the per-example norms.

Opacus 1.6 calls the criterion with its own reduction here, so that the "losses" are one mean over the batch, whose
gradient no weight clips. These classes take one loss per example, and the bound is moved between norms and sum.
"""

from __future__ import annotations

from typing import Any

from opacus.optimizers import DPOptimizerFastGradientClipping as _StockOptimizer
from opacus.utils import adaptive_clipping as stock
from torch import Tensor

from dither.opacus.clipped_backward import clipped_backward
from dither.opacus.loss import DPLossFastGradientClipping, DPTensorFastGradientClipping
from dither.opacus.privacy_engine import PrivacyEngine

_NOISE = "_adjusted_noise_multiplier" if "add_noise" in vars(_StockOptimizer) else "noise_multiplier"
"""The optimizer's attribute that the noise is scaled by; Opacus 1.5.4 has one for noise and accounting alike."""


class DPTensorFastGradientAdaptiveClipping(DPTensorFastGradientClipping, stock.DPTensorFastGradientAdaptiveClipping):
    """One loss per example, shape (B,); `backward` moves the bound, then adds the clipped sum to every `.grad`."""

    def backward(self) -> None:
        """As `DPTensorFastGradientClipping`, clipped at the bound that follows from this batch's norms.

        Guarantee: adding or removing one example changes the sum by at most the new bound in L2 norm, apart from its
        part in the count that moves the bound, which has noise of its own (Andrew et al. 2021, arXiv:1905.03871).
        """
        clipped_backward(self.module, self.optimizer, self.loss_per_sample, self._moved_bound)

    def _moved_bound(self, norms: Tensor) -> float:
        """Set the bound of module and optimizer, and the noise, as Opacus does; return the bound."""
        bound, noise = self._update_clip_and_noise(norms)
        self.module.max_grad_norm = self.optimizer.max_grad_norm = bound
        setattr(self.optimizer, _NOISE, noise)
        return float(bound)


class DPLossFastGradientAdaptiveClipping(stock.DPLossFastGradientAdaptiveClipping, DPLossFastGradientClipping):
    """A criterion for adaptive flash clipping; see Opacus's class of this name, and `DPLossFastGradientClipping`."""

    def __call__(self, *args: Any, shape: Any = None, **kwargs: Any) -> DPTensorFastGradientAdaptiveClipping:
        """The loss of a batch; see `DPLossFastGradientClipping`."""
        return DPTensorFastGradientAdaptiveClipping(
            self.module,
            self.optimizer,
            self.losses(args, kwargs, shape),
            self.loss_reduction,
            self.target_unclipped_quantile,
            self.min_clipbound,
            self.max_clipbound,
            self.clipbound_learning_rate,
            self.initial_noise_multiplier,
        )


class PrivacyEngineAdaptiveClipping(stock.PrivacyEngineAdaptiveClipping, PrivacyEngine):
    """`PrivacyEngine` with adaptive clipping; see `opacus.utils.adaptive_clipping.PrivacyEngineAdaptiveClipping`."""

    def _prepare_criterion(
        self, *, module: Any, optimizer: Any, criterion: Any = None, loss_reduction: str = "mean", **settings: Any
    ) -> DPLossFastGradientAdaptiveClipping:
        kind: Any = DPLossFastGradientAdaptiveClipping
        settings["initial_noise_multiplier"] = optimizer.noise_multiplier
        return kind(module, optimizer, criterion, loss_reduction, **settings)  # type: ignore[no-any-return]
