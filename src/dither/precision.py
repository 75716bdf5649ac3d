"""Full precision around what dither computes itself: norms, weighted sums, formed gradients.

The noise is calibrated to a bound that norms are held against. So norms and sums must not be rounded by settings that
are meant for the speed of a model: an ambient `torch.autocast`, or float32 products in TF32 or bfloat16
(`torch.set_float32_matmul_precision`; `fp32_precision` and `allow_tf32` in `torch.backends`). The latter hold for the
whole process: they are changed when the first thread enters and put back when the last one leaves. What another thread
computes meanwhile is more precise than it asked for.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, ParamSpec, TypeVar

import torch


def _settings_of(*names: tuple[str, str]) -> tuple[Any, ...]:
    return tuple(getattr(getattr(torch.backends, backend), operation) for backend, operation in names)


_EACH = hasattr(torch.backends.mkldnn, "matmul")
"""Whether torch has a setting for each backend and operation (2.9 and later) besides the older ones."""

_ON_CPU = _settings_of(("mkldnn", "matmul"), ("mkldnn", "conv")) if _EACH else ()
_ON_CUDA = _settings_of(("cuda", "matmul"), ("cudnn", "conv")) if _EACH else ()

P = ParamSpec("P")
T = TypeVar("T")


class FullPrecision:
    """A context without autocast, in which products of float32 are products of float32; does nothing where they are."""

    __slots__ = ("_counted", "_regions")

    def __enter__(self) -> None:
        with _shared.lock:
            self._counted = _shared.users > 0 or _reduced()
            if self._counted:
                _shared.enter()
        self._regions: ExitStack | None = None
        for kind in _device_types():
            if torch.is_autocast_enabled(kind):
                self._regions = self._regions or ExitStack()
                self._regions.enter_context(torch.autocast(kind, enabled=False))

    def __exit__(self, *raised: object) -> None:
        if self._regions is not None:
            self._regions.close()
        if self._counted:
            with _shared.lock:
                _shared.leave()


def in_full_precision(function: Callable[P, T]) -> Callable[P, T]:
    """Have a function run in `FullPrecision`."""

    @functools.wraps(function)
    def inside(*args: P.args, **kwargs: P.kwargs) -> T:
        with FullPrecision():
            return function(*args, **kwargs)

    return inside


class _Shared:
    """The settings of the process, and how many contexts want them changed; used under its lock."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.users = 0
        self._before: _Settings | None = None

    def enter(self) -> None:
        if not self.users:
            self._before = _Settings()
            self._before.change()
        self.users += 1

    def leave(self) -> None:
        self.users -= 1
        if not self.users and self._before is not None:
            before, self._before = self._before, None
            before.restore()


class _Settings:
    """The settings as they are now.

    Torch refuses to tell a setting whose older and newer form disagree. So what was set in the older form is changed
    and put back in that form, and only what is left in the newer.
    """

    def __init__(self) -> None:
        self._each = [(backend, backend.fp32_precision) for backend in _ON_CPU + _ON_CUDA]
        self._products = _or_none(torch.get_float32_matmul_precision)
        self._convolutions = _convolutions_in_tf32()

    def change(self) -> None:
        if self._products not in (None, "highest"):
            torch.set_float32_matmul_precision("highest")
        if self._convolutions:
            torch.backends.cudnn.allow_tf32 = False
        for backend in _backends():
            if _is_reduced(backend.fp32_precision):
                backend.fp32_precision = "ieee"

    def restore(self) -> None:
        if self._products not in (None, "highest"):
            torch.set_float32_matmul_precision(self._products)
        if self._convolutions:
            torch.backends.cudnn.allow_tf32 = True
        for backend, before in self._each:
            if backend.fp32_precision != before:
                backend.fp32_precision = (
                    "none"  # follows the backend's setting, or all backends', if that is what it did
                )
            if backend.fp32_precision != before:
                backend.fp32_precision = before


_shared = _Shared()


def _backends() -> tuple[Any, ...]:
    """What has an `fp32_precision` for the matrix products and convolutions of the devices in use."""
    return _ON_CPU + _ON_CUDA if torch.cuda.is_initialized() else _ON_CPU


def _reduced() -> bool:
    """Whether some products of float32 are of less."""
    if _EACH:
        return any(_is_reduced(backend.fp32_precision) for backend in _backends())
    return torch.get_float32_matmul_precision() != "highest" or bool(_convolutions_in_tf32())


def _is_reduced(precision: str) -> bool:
    return precision not in ("none", "ieee")


def _convolutions_in_tf32() -> bool | None:
    """The older setting of convolutions on CUDA, on unless it is switched off; None where there is no such device."""
    return _or_none(lambda: torch.backends.cudnn.allow_tf32) if torch.cuda.is_initialized() else None


def _or_none(setting: Callable[[], T]) -> T | None:
    """A setting; None where torch refuses to tell it, for it was made in the newer form."""
    try:
        return setting()
    except RuntimeError:
        return None


@functools.cache
def _device_types() -> tuple[str, ...]:
    """The CPU, and the accelerator that this torch is built for."""
    try:
        accelerator = torch.accelerator.current_accelerator()
    except RuntimeError:  # of torch 2.6, where there is none
        accelerator = None
    return ("cpu",) if accelerator is None else ("cpu", accelerator.type)


__all__ = ["FullPrecision", "in_full_precision"]
