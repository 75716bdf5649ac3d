"""Where a parameter's `.grad` comes from under flash clipping, so that no optimizer takes an unclipped one.

A flash-clipping optimizer adds noise to whatever `.grad` holds. It may hold clipped sums (from the loss object's
`backward`), a pass that the user weighted by hand with `get_clipping_coef()`, or what a plain `loss.backward()` left:
then the step must not happen.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
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
        total: of a parameter in half precision, what `.grad` is the rounded form of, float32: sums that are rounded
            before the noise may move by more than the bound.
    """

    sums: int | None
    norm: Tensor
    total: Tensor | None = None


Totals = dict[Any, Tensor]
"""What `.grad` is the rounded form of, by parameter; of those in half precision only."""


def clipped(parameters: Sequence[Any], totals: Totals) -> None:
    """A clipped sum was added to each `.grad`, and `totals` is what that makes; see `totals_with`."""
    _mark(parameters, [clipped_sums([parameter]) + 1 for parameter in parameters], totals)


def unclipped(parameters: Iterable[Any]) -> None:
    """An ordinary gradient was added to each `.grad`."""
    found = list(parameters)
    _mark(found, [None] * len(found))


def weighted(parameters: Iterable[Any], totals: Totals) -> None:
    """A pass after the norms, with hooks disabled, was added to each `.grad`: the user weighted it."""
    found = [p for p in parameters if not known(p) or getattr(p, _ATTRIBUTE).sums is not None]
    _mark(found, [0] * len(found), totals)


def totals_of(parameters: Iterable[Any]) -> Totals:
    """Of parameters in half precision, what each `.grad` is the rounded form of, scaled as `.grad` was meanwhile."""
    held = [p for p in parameters if p.grad is not None and known(p)]
    kept = {p: total for p in held if (total := getattr(p, _ATTRIBUTE).total) is not None}
    if not kept:
        return {}
    now, before = _both_norms(held)
    factor = float(now.norm() / before.norm()) if before.any() else 1.0
    if factor > 1 - _SLACK:
        return kept
    return {p: total * factor for p, total in kept.items()}


def totals_with(before: Totals, sums: Mapping[Any, Tensor]) -> Totals:
    """Totals with what is added to each `.grad`, by parameter; of those in half precision."""
    narrow = {p: total for p, total in sums.items() if p.dtype != total.dtype}
    return {p: before[p] + total if p in before else total for p, total in narrow.items()}


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


def _mark(
    parameters: Sequence[Any], sums: Sequence[int | None], totals: Mapping[Any, Tensor] = MappingProxyType({})
) -> None:
    held = [(p, count) for p, count in zip(parameters, sums, strict=True) if p.grad is not None]
    for (parameter, count), norm in zip(held, _norms([p for p, _ in held]), strict=True):
        setattr(parameter, _ATTRIBUTE, _Provenance(count, norm, totals.get(parameter)))


def _norms(parameters: Sequence[Any]) -> Sequence[Tensor]:
    gradients = [p.grad for p in parameters]
    return torch._foreach_norm(gradients) if gradients else []


def _both_norms(parameters: Sequence[Any]) -> tuple[Tensor, Tensor]:
    """The norm of each `.grad` now, and as it was known, float64."""
    now = torch.stack([norm.double().cpu() for norm in _norms(parameters)])
    return now, torch.stack([getattr(p, _ATTRIBUTE).norm.double().cpu() for p in parameters])


def _only_scaled(parameters: Sequence[Any]) -> bool:
    """Whether every gradient is what it was, or all are that times one factor of at most 1."""
    if not parameters:
        return True
    now, before = _both_norms(parameters)
    whole = before.norm()
    factor = now.norm() / whole if whole else torch.ones(())
    same = (now - factor * before).abs() <= _SLACK * (before + whole * _SLACK)
    return bool(factor <= 1 + _SLACK) and bool(same.all())
