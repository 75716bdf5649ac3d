"""Linear maps: x (B, T, d) and output gradient g (B, T, p); example i's weight gradient is g_i^T x_i, shape (p, d).

Ghost norm: |g_i^T x_i|^2 = sum over rows t, s of (x_it . x_is)(g_it . g_is), Goodfellow 2015 for T = 1,
Li et al. 2022 (arXiv:2110.05679, section 4) for T rows.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

import dither.kernels as kernels
from dither.capture.examples import ExampleAxis
from dither.capture.uses import ParamUse
from dither.rules.crossing import CANCELLED, VANISHING, RowFactors, gram_rows
from dither.rules.rule import Cost, Rule, all_strided, at_least_float32, cancels, squared_rows

_TILE_ELEMENTS = 1 << 21
"""Largest tile of per-example gradients kept at once, in elements: of 2^18 to 2^23 near the fastest on four shapes."""


def weighed(x: Tensor, g: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Both factors, the smaller times the weights (B,), in float32 or wider.

    Args:
        x: (B, ..., d).
        g: (B, ..., p), of the same dtype.
        weights: (B,).
    """
    wide = at_least_float32(x.dtype)
    scale = weights.to(wide).view(-1, *[1] * (x.dim() - 1))  # never rounded to half precision: that may double it
    return (x * scale, g.to(wide)) if x.numel() < g.numel() else (x.to(wide), g * scale)


def _widened(x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    wide = at_least_float32(x.dtype)
    return x.to(wide), g.to(wide)


def outer_gradient(x_BTd: Tensor, g_BTp: Tensor, out: Tensor | None = None) -> Tensor:
    """Each example's g^T x, shape (B, p, d)."""
    if out is None:
        return torch.bmm(g_BTp.mT, x_BTd)
    return torch.bmm(g_BTp.mT, x_BTd, out=out)


def outer_tile_norm(x_BTd: Tensor, g_BTp: Tensor) -> Tensor | None:
    """Squared norm of each g^T x in tiles of output features: (B,), in float32 or wider.

    None where rows cancel.
    """
    return _unless_cancelled(_tile_norm(x_BTd, g_BTp), x_BTd, g_BTp)


def _tile_norm(x_BTd: Tensor, g_BTp: Tensor) -> Tensor:
    if kernels.serve(x_BTd, g_BTp):
        return kernels.tile_norm(x_BTd, g_BTp)
    x_BTd, g_BTp = _widened(x_BTd, g_BTp)
    batch, _, d = x_BTd.shape
    step = max(1, min(g_BTp.shape[-1], _TILE_ELEMENTS // max(1, batch * d)))
    total = torch.zeros(batch, dtype=torch.promote_types(x_BTd.real.dtype, torch.float32), device=x_BTd.device)
    for start in range(0, g_BTp.shape[-1], step):
        total += squared_rows(torch.bmm(g_BTp[..., start : start + step].mT, x_BTd))
    return total


def _unless_cancelled(squared: Tensor, x_BTd: Tensor, g_BTp: Tensor) -> Tensor | None:
    terms = _row_norms(x_BTd).mul_(_row_norms(g_BTp)).square_().sum(1)
    return None if cancels(squared, terms, at_least_float32(g_BTp.dtype)) else squared


def _row_norms(rows: Tensor) -> Tensor:
    """Norm of each row, (B, T), in float64."""
    wide = torch.complex128 if rows.is_complex() else torch.float64
    norms: Tensor = torch.linalg.vector_norm(rows, dim=-1, dtype=wide)
    return norms


def outer_ghost_norm(x_BTd: Tensor, g_BTp: Tensor) -> Tensor | None:
    """Squared norm of each g^T x without forming it: (B,), in float32 or wider.

    The sum of Gram products can cancel. Where the result is small against the terms' own size, rounding would show,
    and the norm is taken from tiles instead; None where the rows themselves cancel.
    """
    rows = x_BTd.shape[1]
    if rows == 1:  # norms, then squares: a tiny factor times a huge one must not vanish
        return (_row_norms(x_BTd) * _row_norms(g_BTp)).square().squeeze(1)
    if rows == 0 or x_BTd.is_complex():
        return outer_tile_norm(x_BTd, g_BTp)
    given = x_BTd, g_BTp
    x_BTd, g_BTp = _widened(x_BTd, g_BTp)
    sums, squares = [], []
    step = gram_rows(x_BTd.shape[0], rows)
    for start in range(0, rows, step):
        stop = min(rows, start + step)
        products = torch.bmm(x_BTd[:, start:stop], x_BTd[:, :stop].mT)
        products.mul_(torch.bmm(g_BTp[:, start:stop], g_BTp[:, :stop].mT))
        counts = _counts(start, stop, products.dtype, products.device)
        sums.append(products @ counts)
        squares.append(products.square_() @ counts)
    total = torch.cat(sums, 1).sum(1)
    least = torch.cat(squares, 1).sum(1).sqrt_().mul_(CANCELLED)
    if bool((total < least.clamp_min(VANISHING)).any()):
        return _norm_in_doubt(total, least, *given)
    return total


@functools.lru_cache(maxsize=256)
def _counts(start: int, stop: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """How often each column of some rows of a symmetric matrix counts: those left of the diagonal block twice."""
    counts = torch.ones(stop, dtype=dtype, device=device)
    counts[:start] = 2.0
    return counts


def _norm_in_doubt(total: Tensor, least: Tensor, x_BTd: Tensor, g_BTp: Tensor) -> Tensor | None:
    """Squared norms (B,) where some sums of Gram products are very small, or below what rounding leaves exact."""
    if total.dtype == torch.float32 and bool((vanishing := total < VANISHING).any()) and bool(g_BTp[vanishing].any()):
        return _unless_cancelled(_tile_norm(x_BTd.double(), g_BTp.double()), x_BTd, g_BTp)
    return outer_tile_norm(x_BTd, g_BTp) if bool((total < least).any()) else total


class LinearWeight(Rule):
    """Weight (p, d) of `F.linear`."""

    holds_cheaply = False

    def claims(self, operands: Mapping[str, Any], slot: str) -> bool:
        """Two-dimensional weights on the right."""
        return all_strided(operands) and bool(operands[slot].dim() == 2 and operands["input"].dim() >= 2)

    def _rows(self, use: ParamUse, grad_output: Tensor) -> tuple[Tensor, Tensor]:
        x = use.operand("input")
        x_BTd, g_BTp = use.examples.rows(x), use.examples.rows(grad_output)
        if x.dtype != grad_output.dtype:
            common = torch.promote_types(x.dtype, grad_output.dtype)
            x_BTd, g_BTp = x_BTd.to(common), g_BTp.to(common)
        return x_BTd.conj().resolve_conj() if x.is_complex() else x_BTd, g_BTp

    def per_example_gradient(self, use: ParamUse, grad_output: Tensor, out: Tensor | None = None) -> Tensor:
        """Each example's g^T x."""
        x, g = self._rows(use, grad_output)
        return outer_gradient(x, g, out if out is not None and out.dtype == x.dtype else None)

    def squared_norm(self, use: ParamUse, grad_output: Tensor) -> Tensor | None:
        """Ghost norm."""
        return outer_ghost_norm(*self._rows(use, grad_output))

    def tile_squared_norm(self, use: ParamUse, grad_output: Tensor) -> Tensor | None:
        """Norm in tiles; of one row, the product of the two norms."""
        x, g = self._rows(use, grad_output)
        return outer_ghost_norm(x, g) if x.shape[1] == 1 else outer_tile_norm(x, g)

    def add_weighted_sum(self, use: ParamUse, grad_output: Tensor, weights: Tensor, into: Tensor) -> None:
        """One matrix product over all rows, the weights folded into the smaller factor."""
        x, g = self._rows(use, grad_output)
        x, g = weighed(x, g, weights)
        if into.dtype == x.dtype:
            into.addmm_(g.reshape(-1, g.shape[-1]).T, x.reshape(-1, x.shape[-1]))
        else:
            into.add_(g.reshape(-1, g.shape[-1]).T @ x.reshape(-1, x.shape[-1]))

    def crosses(self, use: ParamUse) -> bool:
        """Real rows, as many for each example."""
        return isinstance(use.axis, ExampleAxis) and not use.parameter.is_complex()

    def row_factors(self, use: ParamUse, grad_output: Tensor) -> RowFactors:
        """Output gradients and inputs."""
        x, g = self._rows(use, grad_output)
        return RowFactors(g, x)

    def cost(self, use: ParamUse) -> Cost:
        """T p d per example formed; T^2 (p + d) for the ghost norm."""
        x = use.operand("input")
        p, d = use.parameter.shape
        batch = use.batch
        rows = max(1, x.numel() // max(1, batch * x.shape[-1]))
        ghost = 2.0 * batch * rows * rows * (p + d) if rows > 1 else 0.0
        width = use.parameter.element_size()
        weighed = 2.0 * batch * rows * min(p, d) * width
        formed = 2.0 * batch * rows * p * d
        return Cost(formed, ghost, float(batch * p * d * width), formed, weighed)
