"""Held gradients (B, P): the weighted sum over examples, and each example's squared norm. No atomics."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dither.kernels.tiles import tiles

_BLOCKS = 8
"""Most blocks of columns that one program squares."""


# Triton compiles a kernel from its source: its arguments are pointers and constants that no annotation names, hence the
# `type: ignore` of each.
@triton.jit
def weighted_sum(  # type: ignore[no-untyped-def]
    held, weights, kept, into, B, P, held_b, BLOCK_B: tl.constexpr, BLOCK_P: tl.constexpr, MASKED: tl.constexpr
):
    """into[c] += sum over kept examples of weights[i] * held[i, c], in float32; rows that are not kept are not read."""
    columns = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    total = tl.zeros((BLOCK_P,), tl.float32)
    for start in range(0, B, BLOCK_B):
        rows = start + tl.arange(0, BLOCK_B)
        live = rows < B
        if MASKED:
            live = live & (tl.load(kept + rows, mask=live, other=0) != 0)
        weight = tl.load(weights + rows, mask=live, other=0.0)
        places = held + rows.to(tl.int64)[:, None] * held_b + columns[None, :]
        values = tl.load(places, mask=live[:, None] & (columns < P)[None, :], other=0.0)
        total += tl.sum(values.to(tl.float32) * weight[:, None], 0)
    before = tl.load(into + columns, mask=columns < P, other=0.0).to(tl.float32)
    tl.store(into + columns, (before + total).to(into.dtype.element_ty), mask=columns < P)


@triton.jit
def row_squares(held, out, P, held_b, chunks, blocks, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Sum of squares of blocks * BLOCK columns of a row, to out (B, chunks)."""
    index = tl.program_id(0)
    row = held + (index // chunks).to(tl.int64) * held_b
    columns = (index % chunks).to(tl.int64) * blocks * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in range(blocks):
        values = tl.load(row + columns, mask=columns < P, other=0.0).to(tl.float32)
        total += values * values
        columns += BLOCK
    tl.store(out + index, tl.sum(total, 0))


def add_weighted(held: Tensor, weights: Tensor, into: Tensor, kept: Tensor | None = None) -> None:
    """Add sum_i weights[i] * held[i] to `into`.

    Args:
        held: (B, P), bfloat16, float16 or float32, each row contiguous.
        weights: (B,).
        into: (P,), contiguous; changed in place, rounded once.
        kept: bool (B,); rows that are not kept count as zero, whatever they and their weights hold.
    """
    examples, P = held.shape
    chosen = tiles(held.device, held.dtype, "weighted sum")
    weights = weights.to(torch.float32).contiguous()
    mask = weights if kept is None else kept.to(torch.int8).contiguous()
    weighted_sum[(triton.cdiv(P, chosen.d),)](
        held, weights, mask, into, examples, P, held.stride(0),
        BLOCK_B=chosen.rows, BLOCK_P=chosen.d, MASKED=kept is not None, num_warps=chosen.warps,
    )  # fmt: skip


def squared_rows(held: Tensor) -> Tensor:
    """Squared norm of each row of (B, P), each row contiguous: (B,), float32, summed in float64."""
    examples, P = held.shape
    chosen = tiles(held.device, held.dtype, "squares")
    block = min(chosen.d, max(128, triton.next_power_of_2(P)))
    blocks = min(_BLOCKS, triton.cdiv(P, block))
    chunks = triton.cdiv(P, block * blocks)
    squares = torch.empty(examples, chunks, dtype=torch.float32, device=held.device)
    row_squares[(examples * chunks,)](
        held, squares, P, held.stride(0), chunks, blocks, BLOCK=block, num_warps=chosen.warps
    )
    return squares.sum(1, dtype=torch.float64).to(torch.float32)
