"""Operations whose backward pass hides NaN, from which the proofs see what depends on what; and others in their place.

Of torch 2.14's operations it is one: logcumsumexp takes logarithms of positive and of negative gradients, and NaN is
neither.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class _LogCumSumExp(torch.autograd.Function):
    """Torch's, whose gradient is NaN wherever a gradient behind it is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int) -> Tensor:
        ctx.save_for_backward(x)
        ctx.dim = dim
        return torch.logcumsumexp(x, dim)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,), (x,), dim = gradients, ctx.saved_tensors, ctx.dim
        with torch._C.DisableTorchFunction(), torch.enable_grad():  # a recorder may be watching, in a checkpoint
            leaf = x.detach().requires_grad_()
            (own,) = torch.autograd.grad(torch.logcumsumexp(leaf, dim), leaf, gradient)
            reached = gradient.isnan().flip(dim).cumsum(dim).flip(dim) > 0
            return own.masked_fill(reached, float("nan")), None


def _logcumsumexp(x: Tensor, dim: int) -> Tensor:
    found: Tensor = _LogCumSumExp.apply(x, dim)
    return found


SHOWING: dict[Any, Callable[..., Any]] = {torch.logcumsumexp: _logcumsumexp, torch.Tensor.logcumsumexp: _logcumsumexp}
"""What to call in place of an operation."""
