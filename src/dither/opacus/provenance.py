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
_SLACK = 1e-3


@dataclass(frozen=True)
class _Provenance:
    """What `.grad` held when it was last known to be clipped; `sums` 0: weighted by the user, None: not clipped."""

    sums: int | None
    place: tuple[int, int]
    norm: Tensor
    total: Tensor


def clipped(parameters: Sequence[Any]) -> None:
    """A clipped sum was added to each `.grad`."""
    for parameter in parameters:
        _mark(parameter, clipped_sums([parameter]) + 1)


def unclipped(parameters: Iterable[Any]) -> None:
    """An ordinary gradient was added to each `.grad`."""
    for parameter in parameters:
        _mark(parameter, None)


def weighted(parameters: Iterable[Any]) -> None:
    """A pass after the norms, with hooks disabled, was added to each `.grad`: the user weighted it."""
    for parameter in parameters:
        found = _of(parameter)
        if found is None or found.sums is not None:
            _mark(parameter, 0)


def forget(parameters: Iterable[Any]) -> None:
    """`.grad` was cleared, or taken by the optimizer."""
    for parameter in parameters:
        if _of(parameter) is not None:
            delattr(parameter, _ATTRIBUTE)


def clipped_sums(parameters: Iterable[Any]) -> int:
    """How many clipped sums wait in `.grad`."""
    found = [_of(p) for p in parameters if p.grad is not None]
    return max((entry.sums or 0 for entry in found if entry is not None), default=0)


def check(parameters: Sequence[Any]) -> None:
    """Check that every `.grad` is clipped, or was weighted by the user, and that nothing was added to it since.

    All may have been scaled by one factor of at most 1, as `torch.nn.utils.clip_grad_norm_` does: that moves two sums
    no further apart.

    Raises:
        CoverageError: a gradient is not known to be clipped.
    """
    with_gradient = [p for p in parameters if p.grad is not None]
    found = [_of(p) for p in with_gradient]
    if all(e is not None and e.sums is not None for e in found) and _unchanged(with_gradient, found):
        return
    bad = next((p for p, e in zip(with_gradient, found, strict=True) if e is None or e.sums is None), None)
    what = "a gradient" if bad is None else f"the gradient of a parameter of shape {tuple(bad.shape)}"
    raise CoverageError(
        f"The optimizer would take {what} that was not clipped: it comes from a plain backward pass, or was written "
        "after the loss object's backward().",
        fix="wrap the criterion, send its value back, and step before anything else writes to .grad:\n"
        "    criterion = DPLossFastGradientClipping(module, optimizer, criterion)\n"
        "    criterion(prediction, target).backward()",
    )


def _mark(parameter: Any, sums: int | None) -> None:
    gradient = parameter.grad
    if gradient is not None:
        entry = _Provenance(sums, _place(gradient), gradient.norm(), gradient.sum())
        setattr(parameter, _ATTRIBUTE, entry)


def _place(gradient: Tensor) -> tuple[int, int]:
    """The memory and the number of writes to it."""
    return gradient.data_ptr(), gradient._version


def _of(parameter: Any) -> _Provenance | None:
    return getattr(parameter, _ATTRIBUTE, None)


def _unchanged(parameters: Sequence[Any], entries: Sequence[Any]) -> bool:
    """Whether every gradient is what it was, or all are that times one factor of at most 1."""
    if all(_place(p.grad) == entry.place for p, entry in zip(parameters, entries, strict=True)):
        return True
    now, then, totals, sizes = [], [], [], []
    for parameter, entry in zip(parameters, entries, strict=True):
        gradient = parameter.grad
        now.append(gradient.norm().double().cpu())
        then.append(entry.norm.double().cpu())
        totals.append((gradient.sum().double().cpu(), entry.total.double().cpu()))
        sizes.append(gradient.numel())
    norms, before = torch.stack(now), torch.stack(then)
    factor = norms.norm() / before.norm()
    sums, sums_before = torch.tensor(totals, dtype=torch.float64).unbind(1)
    spread = before * torch.tensor(sizes, dtype=torch.float64).sqrt()
    same = (norms - factor * before).abs() <= _SLACK * before
    same &= (sums - factor * sums_before).abs() <= _SLACK * spread
    return bool(factor <= 1 + _SLACK) and bool(same.all())
