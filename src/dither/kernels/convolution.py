"""Squared norm of each example's convolution weight gradient, in tiles on chip; no patch is written to memory.

The gradient (O, C/groups, KH, KW) is a product over positions of the output gradient and the patches: an implicit
matrix product whose second factor is gathered from the input as it is needed. Legend: B examples, K maps an example,
C and O channels, Q = C/groups * KH * KW taps.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from dither.kernels.reduction import INTERPRETED, finish, multiply, split, squared_norms
from dither.kernels.tiles import convolution_class, tiles


# Triton compiles a kernel from its source: its arguments are pointers and constants that no annotation names, hence the
# `type: ignore` of each.
@triton.jit
def convolution_tiles(  # type: ignore[no-untyped-def]
    x, g, out, R, P, Q, H, W, OH, OW, each, parts, tiles, tiles_p, tiles_q,
    x_b, x_k, x_c, x_h, x_w, g_b, g_k, g_o, g_h, g_w,
    stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w,
    KH: tl.constexpr, KW: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr, PARTIAL: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """One tile (BLOCK_P, BLOCK_Q) of one group of one example's gradient, summed over `each` of R = K * OH * OW."""
    index = tl.program_id(0)
    part, tile, example = index % parts, (index // parts) % tiles, (index // parts // tiles).to(tl.int64)
    group = tile // (tiles_p * tiles_q)
    ps = (tile // tiles_q % tiles_p) * BLOCK_P + tl.arange(0, BLOCK_P)
    qs = (tile % tiles_q) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    tap_h, tap_w = qs // KW % KH * dilation_h - pad_h, qs % KW * dilation_w - pad_w
    # Within an example offsets fit 32 bits; `fits` says so.
    xs = x + example * x_b + group * (Q // (KH * KW)) * x_c + (qs // (KH * KW) * x_c)[None, :]
    gs = g + example * g_b + group * P * g_o + (ps * g_o)[:, None]
    end = tl.minimum(R, (part + 1) * each)
    accumulated = tl.zeros((BLOCK_P, BLOCK_Q), tl.float32)
    for start in range(part * each, end, BLOCK_R):
        rows = start + tl.arange(0, BLOCK_R)
        maps, h, w = rows // (OH * OW), rows // OW % OH, rows % OW
        live = rows < end
        places = (maps * g_k + h * g_h + w * g_w)[None, :]
        g_PR = tl.load(gs + places, mask=live[None, :] & (ps < P)[:, None], other=0.0)
        x_h_RQ = (h * stride_h)[:, None] + tap_h[None, :]
        x_w_RQ = (w * stride_w)[:, None] + tap_w[None, :]
        inside = (x_h_RQ >= 0) & (x_h_RQ < H) & (x_w_RQ >= 0) & (x_w_RQ < W)
        places = (maps * x_k)[:, None] + x_h_RQ * x_h + x_w_RQ * x_w
        x_RQ = tl.load(xs + places, mask=live[:, None] & (qs < Q)[None, :] & inside, other=0.0)
        accumulated = multiply(g_PR, x_RQ, accumulated, WIDEN)
    finish(accumulated, out, index, PARTIAL)


def fits(*maps: Tensor) -> bool:
    """Whether offsets within an example, also of padding and of a tile's rim, stay in 32 bits."""
    reach = (sum(s * (2 * n + 256) for s, n in zip(m.stride()[1:], m.shape[1:], strict=True)) for m in maps)
    return max(reach) < 2**31


def convolution_tile_norm(
    x_BKCHW: Tensor,
    g_BKOHW: Tensor,
    taps: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Squared norm of each example's weight gradient of a two-dimensional convolution.

    Args:
        x_BKCHW: the maps that taps run over, (B, K, C, H, W), not padded; bfloat16, float16 or float32, any strides.
        g_BKOHW: the map of positions, (B, K, O, OH, OW), the same dtype.
        taps: KH and KW.
        stride: of positions, by axis.
        padding: zeros before the first entry, by axis. Those after the last follow from OH and OW.
        dilation: of taps, by axis.
        groups: of channels.

    Returns:
        Shape (B,), float32.
    """
    batch, maps, channels, H, W = x_BKCHW.shape
    P, OH, OW = g_BKOHW.shape[2] // groups, *g_BKOHW.shape[3:]
    Q = channels // groups * taps[0] * taps[1]
    chosen = tiles(x_BKCHW.device, x_BKCHW.dtype, convolution_class(P, Q))
    tiles_p, tiles_q = triton.cdiv(P, chosen.p), triton.cdiv(Q, chosen.d)
    count, rows = groups * tiles_p * tiles_q, maps * OH * OW
    parts, each = split(rows, batch * count, chosen.rows)

    def accumulate(out: Tensor, partial: bool) -> None:
        convolution_tiles[(batch * count * parts,)](
            x_BKCHW, g_BKOHW, out, rows, P, Q, H, W, OH, OW, each, parts, count, tiles_p, tiles_q,
            *x_BKCHW.stride(), *g_BKOHW.stride(), *stride, *padding, *dilation, KH=taps[0], KW=taps[1],
            BLOCK_R=chosen.rows, BLOCK_P=chosen.p, BLOCK_Q=chosen.d, PARTIAL=partial, WIDEN=INTERPRETED,
            num_warps=chosen.warps, num_stages=chosen.stages,
        )  # fmt: skip

    return squared_norms(accumulate, batch, count, chosen.p * chosen.d, parts, x_BKCHW.device)
