"""Opacus's other ways to wrap a module: expanded weights (here the recorder too), and no per-example gradients."""

from __future__ import annotations

from typing import Any

from torch import nn

from dither.opacus import stock
from dither.opacus.hooks import GradSampleModule


class GradSampleModuleExpandedWeights(GradSampleModule, stock.GradSampleModuleExpandedWeights):
    """Mode "ew": same results as `GradSampleModule`, for any forward; see Opacus's class of this name."""

    def __init__(self, m: nn.Module, *, batch_first: bool = True, loss_reduction: str = "mean") -> None:
        if not batch_first:
            raise NotImplementedError("Expanded weights need batch_first=True; grad_sample_mode='hooks' does not")
        super().__init__(m, batch_first=True, loss_reduction=loss_reduction)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward."""
        return self._module(*args, **kwargs)


class GradSampleModuleNoOp(stock.GradSampleModuleNoOp):
    """Mode "no_op": wraps any forward, computes nothing; see Opacus's class of this name."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward."""
        return self._module.forward(*args, **kwargs)
