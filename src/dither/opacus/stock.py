"""Opacus's classes and functions by their names of today, also where the installed version has not all of them.

Opacus 1.5.4 wraps modules only; 1.6 can also attach to a module that stays unwrapped, by "hooks" classes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import opacus
import opacus.grad_sample as grad_sample
import opacus.grad_sample.utils as utils
from torch import nn

from dither.errors import ConfigurationError


class _NotInThisVersion:
    """Stands for a hooks class that the installed Opacus has not."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        if not issubclass(cls, nn.Module):
            raise _too_old("to attach to a module without wrapping it")
        return object.__new__(cls)


class _NoHooks(_NotInThisVersion):
    """In place of GradSampleHooks."""


class _NoFastHooks(_NoHooks):
    """In place of GradSampleHooksFastGradientClipping."""


class _NoOpHooks(_NotInThisVersion):
    """In place of GradSampleHooksNoOp."""


def _too_old(what: str) -> ConfigurationError:
    return ConfigurationError(f"Opacus {opacus.__version__} is too old {what}.", fix="pip install 'opacus>=1.6'")


def _get_hooks_class(grad_sample_mode: str) -> Any:
    raise _too_old("for wrap_model=False")


def _prepare_module(model: Any, grad_sample_mode: str, wrap_model: bool = True, *args: Any, **kwargs: Any) -> Any:
    return utils.wrap_model(model, grad_sample_mode, *args, **kwargs)


GradSampleModule: Any = grad_sample.GradSampleModule
GradSampleModuleFastGradientClipping: Any = grad_sample.GradSampleModuleFastGradientClipping
GradSampleModuleExpandedWeights: Any = grad_sample.GradSampleModuleExpandedWeights
GradSampleModuleNoOp: Any = grad_sample.GradSampleModuleNoOp
AbstractGradSampleModule: Any = grad_sample.AbstractGradSampleModule
AbstractGradSampleHooks: Any = getattr(grad_sample, "AbstractGradSampleHooks", _NotInThisVersion)
GradSampleHooks: Any = getattr(grad_sample, "GradSampleHooks", _NoHooks)
GradSampleHooksFastGradientClipping: Any = getattr(grad_sample, "GradSampleHooksFastGradientClipping", _NoFastHooks)
GradSampleHooksNoOp: Any = getattr(grad_sample, "GradSampleHooksNoOp", _NoOpHooks)

remove_hooks: Any = getattr(GradSampleHooks, "remove_hooks", GradSampleModule.remove_hooks)

get_gsm_class: Callable[..., Any] = utils.get_gsm_class
get_hooks_class: Callable[..., Any] = getattr(utils, "get_hooks_class", _get_hooks_class)
prepare_module: Callable[..., Any] = getattr(utils, "prepare_module", _prepare_module)
wrap_model: Callable[..., Any] = utils.wrap_model
