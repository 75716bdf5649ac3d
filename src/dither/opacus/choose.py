"""Which class serves a `grad_sample_mode` and a `clipping`, with Opacus's names and errors."""

from __future__ import annotations

from typing import Any

import opacus.optimizers as stock_optimizers

from dither.errors import UnsupportedOpError
from dither.opacus import fast_gradient_clipping, hooks, modes, optimizers, stock

REPLACED: dict[type, type] = {
    stock.GradSampleHooks: hooks.GradSampleHooks,
    stock.GradSampleModule: hooks.GradSampleModule,
    stock.GradSampleHooksFastGradientClipping: fast_gradient_clipping.GradSampleHooksFastGradientClipping,
    stock.GradSampleModuleFastGradientClipping: fast_gradient_clipping.GradSampleModuleFastGradientClipping,
    stock.GradSampleModuleExpandedWeights: modes.GradSampleModuleExpandedWeights,
    stock.GradSampleModuleNoOp: modes.GradSampleModuleNoOp,
    stock_optimizers.DPOptimizer: optimizers.DPOptimizer,
    stock_optimizers.AdaClipDPOptimizer: optimizers.AdaClipDPOptimizer,
    stock_optimizers.DPPerLayerOptimizer: optimizers.DPPerLayerOptimizer,
    stock_optimizers.DistributedDPOptimizer: optimizers.DistributedDPOptimizer,
    stock_optimizers.SimpleDistributedPerLayerOptimizer: optimizers.SimpleDistributedPerLayerOptimizer,
    stock_optimizers.DPOptimizerFastGradientClipping: optimizers.DPOptimizerFastGradientClipping,
    stock_optimizers.DistributedDPOptimizerFastGradientClipping: optimizers.DistributedDPOptimizerFastGradientClipping,
}
"""Opacus's classes and what takes their place."""

_get_optimizer_class = stock_optimizers.get_optimizer_class


def get_gsm_class(grad_sample_mode: str) -> Any:
    """The wrapper of a mode: hooks, functorch, ew, ghost or no_op.

    Raises:
        ValueError: no such mode.
        UnsupportedOpError: ghost_fsdp or ghost_tp, whose shards are not recorded.
    """
    _refuse_shards(grad_sample_mode)
    found = stock.get_gsm_class(grad_sample_mode)
    return REPLACED.get(found, found)


def get_hooks_class(grad_sample_mode: str) -> Any:
    """The hooks object of a mode, for `wrap_model=False`.

    Raises:
        ValueError: no such mode.
        UnsupportedOpError: ghost_fsdp or ghost_tp, whose shards are not recorded.
    """
    _refuse_shards(grad_sample_mode)
    found = stock.get_hooks_class(grad_sample_mode)
    return REPLACED.get(found, found)


def _refuse_shards(grad_sample_mode: str) -> None:
    if grad_sample_mode in ("ghost_fsdp", "ghost_tp"):
        raise UnsupportedOpError(
            f"grad_sample_mode={grad_sample_mode!r} is not served: parameters that are shards are not recorded.",
            fix="grad_sample_mode='ghost' on one device, or stock Opacus without dither",
        )


def get_optimizer_class(clipping: str, distributed: bool, grad_sample_mode: str | None = None) -> Any:
    """The optimizer of a clipping function: flat, per_layer or adaptive.

    Raises:
        ValueError: no such combination.
    """
    found = _get_optimizer_class(clipping, distributed, grad_sample_mode)
    return REPLACED.get(found, found)


def prepare_module(model: Any, grad_sample_mode: str, wrap_model: bool = True, *args: Any, **kwargs: Any) -> Any:
    """Wrap a module, or attach hooks to it; see `opacus.grad_sample.prepare_module`."""
    if grad_sample_mode == "functorch":
        kwargs["force_functorch"] = True
    kind = get_gsm_class(grad_sample_mode) if wrap_model else get_hooks_class(grad_sample_mode)
    return kind(model, *args, **kwargs)


def wrap_model(model: Any, grad_sample_mode: str, wrap_model: bool = True, *args: Any, **kwargs: Any) -> Any:
    """The older name of `prepare_module`."""
    return prepare_module(model, grad_sample_mode, wrap_model, *args, **kwargs)
