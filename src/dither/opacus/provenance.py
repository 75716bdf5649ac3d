"""Where a parameter's `.grad` comes from under flash clipping, so that no optimizer takes an unclipped one.

A flash-clipping optimizer adds noise to whatever `.grad` holds. It may hold clipped sums (from the loss object's
`backward`), a pass that the user weighted by hand with `get_clipping_coef()`, or what a plain `loss.backward()` left:
then the step must not happen.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from dither.errors import CoverageError

_ATTRIBUTE = "_dither_provenance"
_UNCLIPPED, _WEIGHTED = "unclipped", "weighted"


def clipped(parameters: Iterable[Any]) -> None:
    """A clipped sum was added to each `.grad`."""
    for parameter in parameters:
        setattr(parameter, _ATTRIBUTE, _sums(parameter) + 1)


def unclipped(parameters: Iterable[Any]) -> None:
    """An ordinary gradient was added to each `.grad`."""
    for parameter in parameters:
        setattr(parameter, _ATTRIBUTE, _UNCLIPPED)


def weighted(parameters: Iterable[Any]) -> None:
    """A pass after the norms, with hooks disabled, was added to each `.grad`: the user weighted it."""
    for parameter in parameters:
        if getattr(parameter, _ATTRIBUTE, None) != _UNCLIPPED:
            setattr(parameter, _ATTRIBUTE, _WEIGHTED)


def forget(parameters: Iterable[Any]) -> None:
    """`.grad` was cleared, or taken by the optimizer."""
    for parameter in parameters:
        if hasattr(parameter, _ATTRIBUTE):
            delattr(parameter, _ATTRIBUTE)


def clipped_sums(parameters: Iterable[Any]) -> int:
    """How many clipped sums wait in `.grad`."""
    return max((_sums(p) for p in parameters if p.grad is not None), default=0)


def check(parameters: Iterable[Any]) -> None:
    """Raise CoverageError unless every `.grad` is clipped, or was weighted by the user."""
    for parameter in parameters:
        found = getattr(parameter, _ATTRIBUTE, None)
        if (parameter.grad is not None and found is None) or found == _UNCLIPPED:
            raise CoverageError(
                f"The gradient of a parameter of shape {tuple(parameter.shape)} was not clipped: it comes from a plain "
                "backward pass, not from the loss object of flash clipping.",
                fix="wrap the criterion and send its value back:\n"
                "    criterion = DPLossFastGradientClipping(module, optimizer, criterion)\n"
                "    criterion(prediction, target).backward()",
            )


def _sums(parameter: Any) -> int:
    found = getattr(parameter, _ATTRIBUTE, 0)
    return found if isinstance(found, int) else 0
