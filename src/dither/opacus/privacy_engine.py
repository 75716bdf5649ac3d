"""Opacus's `PrivacyEngine` with this package's classes."""

from __future__ import annotations

from typing import Any

import opacus
from opacus.optimizers import DPOptimizer as _StockDPOptimizer
from torch import nn, optim

from dither.opacus import choose, stock
from dither.opacus.loss import DPLossFastGradientClipping


class PrivacyEngine(opacus.PrivacyEngine):
    """Makes a model, an optimizer and a data loader private; see `opacus.PrivacyEngine`.

    Guarantee: that of Opacus's accountants, under adding or removing one example, for Poisson batches.
    """

    def _prepare_model(
        self,
        module: nn.Module,
        *,
        batch_first: bool = True,
        max_grad_norm: Any = 1.0,
        loss_reduction: str = "mean",
        grad_sample_mode: str = "hooks",
        wrap_model: bool = True,
    ) -> Any:
        self.validate(module=module, optimizer=None, data_loader=None)
        kind = choose.get_gsm_class(grad_sample_mode) if wrap_model else choose.get_hooks_class(grad_sample_mode)
        if wrap_model and isinstance(module, stock.AbstractGradSampleModule):
            same = module.batch_first == batch_first and module.loss_reduction == loss_reduction
            if not same or not isinstance(module, kind):
                raise ValueError(
                    f"Pre-existing GradSampleModule ({type(module).__name__}, batch_first={module.batch_first}, "
                    f"loss_reduction={module.loss_reduction!r}) doesn't match new arguments ({kind.__name__}, "
                    f"{batch_first}, {loss_reduction!r}). Please pass vanilla nn.Module instead"
                )
            return module
        options: dict[str, Any] = {"batch_first": batch_first, "loss_reduction": loss_reduction}
        if grad_sample_mode.startswith("ghost"):
            options["max_grad_norm"] = max_grad_norm
        if grad_sample_mode == "functorch":
            options["force_functorch"] = True
        return kind(module, **options)

    def _prepare_optimizer(
        self,
        *,
        optimizer: optim.Optimizer,
        distributed: bool = False,
        clipping: str = "flat",
        noise_generator: Any = None,
        grad_sample_mode: str = "hooks",
        **options: Any,
    ) -> Any:
        if isinstance(optimizer, _StockDPOptimizer):
            optimizer = optimizer.original_optimizer
        kind = choose.get_optimizer_class(clipping, distributed, grad_sample_mode)
        generator = self.secure_rng if self.secure_mode else noise_generator
        return kind(optimizer=optimizer, generator=generator, secure_mode=self.secure_mode, **options)

    def _prepare_criterion(
        self, *, module: Any, optimizer: Any, criterion: Any, loss_reduction: str = "mean", **kwargs: Any
    ) -> DPLossFastGradientClipping:
        return DPLossFastGradientClipping(module, optimizer, criterion, loss_reduction)
