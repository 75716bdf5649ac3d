"""Where a parameter's `.grad` comes from under flash clipping, so that no optimizer takes an unclipped one.

A flash-clipping optimizer adds noise to whatever `.grad` holds. It may hold clipped sums (from the loss object's
`backward`), a pass that the user weighted by hand with `get_clipping_coef()`, or what a plain `loss.backward()` left:
then the step must not happen.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dither.errors import CoverageError

_ATTRIBUTE = "_dither_provenance"
_SLACK = 1e-5


@dataclass(frozen=True)
class _Provenance:
    """What `.grad` held when it was last known to be clipped.

    Attributes:
        sums: the number of clipped sums in it; 0: cleared, or weighted by the user; None: not clipped.
        norm: its norm.
    """

    sums: int | None
    norm: Tensor


def clipped(parameters: Sequence[Any]) -> None:
    """A clipped sum was added to each `.grad`."""
    _mark(parameters, [clipped_sums([parameter]) + 1 for parameter in parameters])


def unclipped(parameters: Iterable[Any]) -> None:
    """An ordinary gradient was added to each `.grad`."""
    found = list(parameters)
    _mark(found, [None] * len(found))


def weighted(parameters: Iterable[Any]) -> None:
    """A pass after the norms, with hooks disabled, was added to each `.grad`: the user weighted it."""
    found = [p for p in parameters if not known(p) or getattr(p, _ATTRIBUTE).sums is not None]
    _mark(found, [0] * len(found))


def cleared(parameters: Sequence[Any]) -> None:
    """`.grad` was set to zero, or to None."""
    for parameter in parameters:
        setattr(parameter, _ATTRIBUTE, _Provenance(0, torch.zeros(())))


def forget(parameters: Iterable[Any]) -> None:
    """`.grad` was taken by the optimizer."""
    for parameter in parameters:
        if known(parameter):
            delattr(parameter, _ATTRIBUTE)


def known(parameter: Any) -> bool:
    """Whether it is known where `.grad` comes from."""
    return hasattr(parameter, _ATTRIBUTE)


def clipped_sums(parameters: Iterable[Any]) -> int:
    """How many clipped sums wait in `.grad`."""
    found = [getattr(p, _ATTRIBUTE) for p in parameters if p.grad is not None and known(p)]
    return max((entry.sums or 0 for entry in found), default=0)


def check(parameters: Sequence[Any]) -> None:
    """Check that every `.grad` is clipped, or was weighted by the user, and that nothing was added to it since.

    All may have been scaled by one factor of at most 1, as `torch.nn.utils.clip_grad_norm_` does: that moves two sums
    no further apart.

    Raises:
        CoverageError: a gradient is not known to be clipped.
    """
    held = [p for p in parameters if p.grad is not None]
    bad = next((p for p in held if not known(p) or getattr(p, _ATTRIBUTE).sums is None), None)
    if bad is None and _only_scaled(held):
        return
    what = "a gradient" if bad is None else f"the gradient of a parameter of shape {tuple(bad.shape)}"
    raise CoverageError(
        f"The optimizer would take {what} that was not clipped: it comes from a plain backward pass, or was written "
        "after the loss object's backward().",
        fix="wrap the criterion, send its value back, and step before anything else writes to .grad:\n"
        "    criterion = DPLossFastGradientClipping(module, optimizer, criterion)\n"
        "    criterion(prediction, target).backward()",
    )


def _mark(parameters: Sequence[Any], sums: Sequence[int | None]) -> None:
    held = [(p, count) for p, count in zip(parameters, sums, strict=True) if p.grad is not None]
    for (parameter, count), norm in zip(held, _norms([p for p, _ in held]), strict=True):
        setattr(parameter, _ATTRIBUTE, _Provenance(count, norm))


def _norms(parameters: Sequence[Any]) -> Sequence[Tensor]:
    gradients = [p.grad for p in parameters]
    return torch._foreach_norm(gradients) if gradients else []


def _only_scaled(parameters: Sequence[Any]) -> bool:
    """Whether every gradient is what it was, or all are that times one factor of at most 1."""
    if not parameters:
        return True
    now = torch.stack([norm.double().cpu() for norm in _norms(parameters)])
    before = torch.stack([getattr(p, _ATTRIBUTE).norm.double().cpu() for p in parameters])
    whole = before.norm()
    factor = now.norm() / whole if whole else torch.ones(())
    same = (now - factor * before).abs() <= _SLACK * (before + whole * _SLACK)
    return bool(factor <= 1 + _SLACK) and bool(same.all())
