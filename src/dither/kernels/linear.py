"""Squared norm of each g_i^T x_i, x (B, T, d) and g (B, T, p), in tiles on chip: no per-example gradient in memory."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from dither.kernels.reduction import INTERPRETED, finish, multiply, split, squared_norms
from dither.kernels.tiles import linear_class, tiles


# Triton compiles a kernel from its source: its arguments are pointers and constants that no annotation names, hence the
# `type: ignore` of each.
@triton.jit
def linear_tiles(  # type: ignore[no-untyped-def]
    x, g, out, T, P, D, each, parts, tiles, tiles_d,
    x_b, x_t, x_d, g_b, g_t, g_p,
    BLOCK_T: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr, PARTIAL: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """One tile (BLOCK_P, BLOCK_D) of one example's gradient, summed over `each` rows in float32."""
    index = tl.program_id(0)
    part, tile, example = index % parts, (index // parts) % tiles, (index // parts // tiles).to(tl.int64)
    rows = part.to(tl.int64) * each + tl.arange(0, BLOCK_T)
    ps = (tile // tiles_d) * BLOCK_P + tl.arange(0, BLOCK_P)
    ds = (tile % tiles_d) * BLOCK_D + tl.arange(0, BLOCK_D)
    # Offsets in 64 bits: examples, and strided rows, lie further apart than 32 can say.
    xs = x + example * x_b + rows[:, None] * x_t + ds[None, :].to(tl.int64) * x_d
    gs = g + example * g_b + rows[None, :] * g_t + ps[:, None].to(tl.int64) * g_p
    x_step, g_step = tl.cast(x_t, tl.int64) * BLOCK_T, tl.cast(g_t, tl.int64) * BLOCK_T
    end = tl.minimum(T, (part + 1) * each)
    accumulated = tl.zeros((BLOCK_P, BLOCK_D), tl.float32)
    for start in range(part * each, end, BLOCK_T):
        live = start + tl.arange(0, BLOCK_T) < end
        x_TD = tl.load(xs, mask=live[:, None] & (ds < D)[None, :], other=0.0)
        g_PT = tl.load(gs, mask=live[None, :] & (ps < P)[:, None], other=0.0)  # transposed as it is read
        accumulated = multiply(g_PT, x_TD, accumulated, WIDEN)
        xs += x_step
        gs += g_step
    finish(accumulated, out, index, PARTIAL)


def tile_norm(x_BTd: Tensor, g_BTp: Tensor) -> Tensor:
    """Squared norm of each g^T x.

    Args:
        x_BTd: inputs, bfloat16, float16 or float32, any strides.
        g_BTp: output gradients, the same dtype.

    Returns:
        Shape (B,), float32.
    """
    if g_BTp.shape[-1] < x_BTd.shape[-1]:  # |g^T x| = |x^T g|, and the table knows p >= d
        x_BTd, g_BTp = g_BTp, x_BTd
    (batch, T, d), p = x_BTd.shape, g_BTp.shape[-1]
    chosen = tiles(x_BTd.device, x_BTd.dtype, linear_class(x_BTd, g_BTp))
    tiles_d = triton.cdiv(d, chosen.d)
    count = triton.cdiv(p, chosen.p) * tiles_d
    parts, each = split(T, batch * count, chosen.rows)

    def accumulate(out: Tensor, partial: bool) -> None:
        linear_tiles[(batch * count * parts,)](
            x_BTd, g_BTp, out, T, p, d, each, parts, count, tiles_d, *x_BTd.stride(), *g_BTp.stride(),
            BLOCK_T=chosen.rows, BLOCK_P=chosen.p, BLOCK_D=chosen.d, PARTIAL=partial, WIDEN=INTERPRETED,
            num_warps=chosen.warps, num_stages=chosen.stages,
        )  # fmt: skip

    return squared_norms(accumulate, batch, count, chosen.p * chosen.d, parts, x_BTd.device)
