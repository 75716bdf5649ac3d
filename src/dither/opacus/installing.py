"""`install()`: code that imports from `opacus` gets this package's classes, whatever was imported first.

Two things are done, both undone by `uninstall()`. Every name in every loaded module that stands for a replaced object
of Opacus's is bound to the replacement. And calling a replaced class gives an instance of the replacement, for
references that no module holds, such as a name inside a running function.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from types import ModuleType, TracebackType
from typing import Any

import opacus.optimizers as stock_optimizers
from opacus import PrivacyEngine as _StockPrivacyEngine
from opacus.utils import adaptive_clipping as stock_adaptive
from opacus.utils import fast_gradient_clipping_utils as stock_loss

from dither.opacus import adaptive, choose, loss, privacy_engine, stock

CLASSES: dict[type, type] = {
    **{theirs: ours for theirs, ours in choose.REPLACED.items() if not theirs.__module__.startswith("dither.")},
    _StockPrivacyEngine: privacy_engine.PrivacyEngine,
    stock_loss.DPLossFastGradientClipping: loss.DPLossFastGradientClipping,
    stock_loss.DPTensorFastGradientClipping: loss.DPTensorFastGradientClipping,
    stock_adaptive.PrivacyEngineAdaptiveClipping: adaptive.PrivacyEngineAdaptiveClipping,
    stock_adaptive.DPLossFastGradientAdaptiveClipping: adaptive.DPLossFastGradientAdaptiveClipping,
    stock_adaptive.DPTensorFastGradientAdaptiveClipping: adaptive.DPTensorFastGradientAdaptiveClipping,
}
"""Opacus's classes and the subclasses that replace them."""

FUNCTIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    stock.get_gsm_class: choose.get_gsm_class,
    stock.get_hooks_class: choose.get_hooks_class,
    stock.prepare_module: choose.prepare_module,
    stock.wrap_model: choose.wrap_model,
    stock_optimizers.get_optimizer_class: choose.get_optimizer_class,
}
"""Opacus's functions and what replaces them."""

_REPLACEMENTS: dict[Any, Any] = {**CLASSES, **FUNCTIONS}

_bound: list[tuple[ModuleType, str]] = []
"""Names outside of Opacus that `install` bound; those that others imported from here are not for `uninstall`."""

_state = {"installed": False}


class Installation:
    """What `install` returns: a context manager that uninstalls at its end."""

    def __enter__(self) -> Installation:
        """The installation itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Uninstall."""
        uninstall()


def install() -> Installation:
    """Let code that imports from `opacus` get the classes of `dither.opacus`, until `uninstall()`.

    Works whatever was imported first, in this process only. Installing twice is the same as once. Models that are
    wrapped already stay as they are.

    Returns:
        A context manager: `with dither.opacus.install(): ...` uninstalls at the end.
    """
    if not installed():
        _state["installed"] = True
        _bound.extend(_rebind(_REPLACEMENTS, [(m, name) for m in _modules() for name in list(vars(m))]))
        for stock, ours in CLASSES.items():
            _redirect(stock, ours)
    return Installation()


def uninstall() -> None:
    """Undo `install()`: `opacus` is what it was. What was wrapped or imported in between stays as it is."""
    if installed():
        _state["installed"] = False
        own = [(m, name) for m in _modules() if _top(m) == "opacus" for name in list(vars(m))]
        _rebind({ours: stock for stock, ours in _REPLACEMENTS.items()}, [*own, *_bound])
        _bound.clear()


def installed() -> bool:
    """Whether `opacus` has the classes of `dither.opacus` now."""
    return _state["installed"]


def _rebind(replacements: Mapping[Any, Any], places: Iterable[tuple[ModuleType, str]]) -> list[tuple[ModuleType, str]]:
    """Bind what is replaced to its replacement in those places; return where."""
    by_id = {id(old): new for old, new in replacements.items()}
    found = []
    for module, name in places:
        new = by_id.get(id(vars(module).get(name)))
        if new is not None:
            setattr(module, name, new)
            found.append((module, name))
    return found


def _modules() -> list[ModuleType]:
    """Every loaded module but this package's own."""
    return [m for m in list(sys.modules.values()) if isinstance(m, ModuleType) and _top(m) != "dither"]


def _top(module: ModuleType) -> str:
    return module.__name__.partition(".")[0]


def _redirect(stock: Any, ours: type) -> None:
    """While installed, calling a class of Opacus's makes an instance of its replacement."""
    if "__new__" in vars(stock):  # from an earlier installation: Python cannot take it away again
        return

    def new(kind: type, *args: Any, **kwargs: Any) -> Any:
        # Without arguments it is a copy or an unpickling, whose class is settled.
        redirected = kind is stock and installed() and bool(args or kwargs)
        return object.__new__(ours if redirected else kind)

    stock.__new__ = new
