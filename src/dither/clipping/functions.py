"""Clipping functions: per-example norms to factors. Each states its L2 sensitivity, add or remove one example."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dither.errors import ConfigurationError, UnknownClippingError


class ClippingFunction(Protocol):
    """Maps per-example norms to the factor that scales each gradient."""

    @property
    def sensitivity(self) -> float:
        """The most that adding or removing one example moves the clipped sum, in L2 norm."""
        ...

    def factors(self, norms: Tensor) -> Tensor:
        """Norms (B,) to factors (B,), finite and at least zero."""
        ...


@dataclass(frozen=True)
class Flat:
    """One bound on the norm over all parameters: min(1, C / norm) (Abadi et al. 2016, algorithm 1).

    Guarantee: every scaled gradient has norm at most C = max_grad_norm, so the sum over examples has L2 sensitivity C
    under adding or removing one example.
    """

    max_grad_norm: float

    @property
    def sensitivity(self) -> float:
        """C."""
        return self.max_grad_norm

    def factors(self, norms: Tensor) -> Tensor:
        """min(1, C / norm)."""
        return (norms / self.max_grad_norm).clamp_min_(1.0).reciprocal_()


def clipping_function(name: str, max_grad_norm: float) -> ClippingFunction:
    """The clipping function of that name.

    Raises:
        UnknownClippingError: no such function.
        ConfigurationError: max_grad_norm is not positive and finite.
    """
    if not 0.0 < max_grad_norm < float("inf"):
        raise ConfigurationError(
            f"max_grad_norm must be positive and finite; it is {max_grad_norm}.", fix="0.1 to 1.0 is usual"
        )
    if name != "flat":
        raise UnknownClippingError(f"Unknown clipping {name!r}; known: 'flat'.", fix="use clipping='flat'")
    return Flat(max_grad_norm)


def all_finite(numbers: Tensor) -> bool:
    """Whether every entry is finite."""
    # The sum of finite entries can overflow; only then every entry is looked at.
    return math.isfinite(float(numbers.sum())) or bool(torch.isfinite(numbers).all())
