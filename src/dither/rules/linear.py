"""Linear maps: x (B, T, d) and output gradient g (B, T, p); example i's weight gradient is g_i^T x_i, shape (p, d).

Ghost norm: |g_i^T x_i|^2 = sum over rows t, s of (x_it . x_is)(g_it . g_is), Goodfellow 2015 for T = 1,
Li et al. 2022 (arXiv:2110.05679, section 4) for T rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dither.capture.uses import ParamUse
from dither.rules.affine import BroadcastAdd
from dither.rules.rule import Cost, Rule, register_rule, squared_rows

_GRAM_ELEMENTS = 1 << 24
"""Largest Gram matrix block kept at once, in elements."""

_TILE_ELEMENTS = 1 << 20
"""Largest tile of per-example gradients kept at once, in elements."""


def outer_gradient(x_BTd: Tensor, g_BTp: Tensor, out: Tensor | None = None) -> Tensor:
    """Each example's g^T x, shape (B, p, d)."""
    if out is None:
        return torch.bmm(g_BTp.mT, x_BTd)
    return torch.bmm(g_BTp.mT, x_BTd, out=out)


def outer_tile_norm(x_BTd: Tensor, g_BTp: Tensor) -> Tensor:
    """Squared norm of each g^T x in tiles of output features: (B,), little memory, no cancellation."""
    batch, _, d = x_BTd.shape
    step = max(1, min(g_BTp.shape[-1], _TILE_ELEMENTS // max(1, batch * d)))
    total = torch.zeros(batch, dtype=torch.promote_types(x_BTd.dtype, torch.float32), device=x_BTd.device)
    for start in range(0, g_BTp.shape[-1], step):
        total += squared_rows(torch.bmm(g_BTp[..., start : start + step].mT, x_BTd))
    return total


def outer_ghost_norm(x_BTd: Tensor, g_BTp: Tensor) -> Tensor:
    """Squared norm of each g^T x without forming it: (B,).

    The sum of Gram products can cancel. Where the result is small against the terms' own size, rounding would show,
    and the norm is taken from tiles instead.
    """
    rows = x_BTd.shape[1]
    if rows == 1:
        return squared_rows(x_BTd) * squared_rows(g_BTp)
    step = max(1, _GRAM_ELEMENTS // max(1, x_BTd.shape[0] * rows))
    total: Tensor | float = 0.0
    terms: Tensor | float = 0.0
    for start in range(0, rows, step):
        gram = torch.bmm(x_BTd[:, start : start + step], x_BTd.mT)
        gram.mul_(torch.bmm(g_BTp[:, start : start + step], g_BTp.mT))
        total = total + gram.sum((1, 2))
        terms = terms + squared_rows(gram)
    assert isinstance(total, Tensor) and isinstance(terms, Tensor)
    if bool((total < 0.05 * terms.sqrt()).any()):
        return outer_tile_norm(x_BTd, g_BTp)
    return total


class LinearWeight(Rule):
    """Weight of `F.linear` (p, d), or of `x @ W` (d, p) when `transposed`."""

    holds_cheaply = False

    def __init__(self, transposed: bool = False) -> None:
        self.transposed = transposed

    def claims(self, operands: Mapping[str, Any], slot: str) -> bool:
        """Two-dimensional weights on the right."""
        return bool(operands[slot].dim() == 2 and operands["input"].dim() >= 2)

    def _rows(self, use: ParamUse, grad_output: Tensor) -> tuple[Tensor, Tensor]:
        x = use.operand("input")
        common = torch.promote_types(x.dtype, grad_output.dtype)
        g_BTp = use.examples.rows(grad_output).to(common)
        return use.examples.rows(x).to(common), g_BTp

    def _pair(self, use: ParamUse, grad_output: Tensor) -> tuple[Tensor, Tensor]:
        """The right and left factors of the gradient in the parameter's own orientation."""
        x, g = self._rows(use, grad_output)
        return (g, x) if self.transposed else (x, g)

    def per_example_gradient(self, use: ParamUse, grad_output: Tensor, out: Tensor | None = None) -> Tensor:
        """Each example's g^T x."""
        right, left = self._pair(use, grad_output)
        return outer_gradient(right, left, out if out is not None and out.dtype == right.dtype else None)

    def squared_norm(self, use: ParamUse, grad_output: Tensor) -> Tensor:
        """Ghost norm."""
        return outer_ghost_norm(*_at_least_float32(*self._rows(use, grad_output)))

    def tile_squared_norm(self, use: ParamUse, grad_output: Tensor) -> Tensor:
        """Norm in tiles; of one row, the product of the two norms."""
        x, g = _at_least_float32(*self._rows(use, grad_output))
        return outer_ghost_norm(x, g) if x.shape[1] == 1 else outer_tile_norm(x, g)

    def add_weighted_sum(self, use: ParamUse, grad_output: Tensor, weights: Tensor, into: Tensor) -> None:
        """One matrix product over all rows, the weights folded into the smaller factor."""
        right, left = self._pair(use, grad_output)
        scale = weights.to(right.dtype).view(-1, 1, 1)
        right, left = (right * scale, left) if right.shape[-1] < left.shape[-1] else (right, left * scale)
        if into.dtype == right.dtype:
            into.addmm_(left.reshape(-1, left.shape[-1]).T, right.reshape(-1, right.shape[-1]))
        else:
            into.add_(left.reshape(-1, left.shape[-1]).T @ right.reshape(-1, right.shape[-1]))

    def cost(self, use: ParamUse) -> Cost:
        """T p d per example formed; T^2 (p + d) for the ghost norm."""
        x = use.operand("input")
        p, d = use.parameter.shape
        batch = use.batch
        rows = max(1, x.numel() // max(1, batch * x.shape[-1]))
        ghost = 2.0 * batch * rows * rows * (p + d) if rows > 1 else 0.0
        return Cost(2.0 * batch * rows * p * d, ghost, float(batch * p * d * use.parameter.element_size()))


def _at_least_float32(x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(x.dtype, torch.float32)
    return x.to(wide), g.to(wide)


register_rule(F.linear, ("input", "weight", "bias"), {"weight": LinearWeight(), "bias": BroadcastAdd()})
register_rule(
    (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.mm, torch.Tensor.mm),
    ("input", "weight"),
    {"weight": LinearWeight(transposed=True)},
)
