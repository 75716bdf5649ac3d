"""Long sums shared out among programs, and how their parts become squared norms.

A tile must be whole before it is squared. If there are few tiles and many rows, programs write partial tiles, and a
second kernel adds them, squares and sums. No atomics: the same inputs give the same bits.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether the kernels run in Triton's interpreter, on a CPU."""

PROGRAMS = 256
"""Programs wanted at least: two for each multiprocessor of an A100 (108) or H100 (132), rounded."""

SPLIT_ROWS = 512
"""Rows below which a sum is not shared out."""

CHUNK = 1024
"""Entries of partial tiles that one program squares."""


def split(rows: int, programs: int, block: int) -> tuple[int, int]:
    """How to share out a sum.

    At most PROGRAMS + programs partial tiles are written, and none unless programs < PROGRAMS: 32 MiB of float32 in
    tiles of 128 x 128.

    Args:
        rows: rows to add.
        programs: programs without a split.
        block: rows taken at a time.

    Returns:
        (parts, rows of each part, a multiple of block).
    """
    parts = max(1, min(triton.cdiv(rows, SPLIT_ROWS), triton.cdiv(PROGRAMS, programs)))
    each = triton.cdiv(triton.cdiv(rows, parts), block) * block
    return triton.cdiv(rows, each), each


# Triton compiles a kernel from its source: its arguments are pointers and constants that no annotation names, hence the
# `type: ignore` of each.
@triton.jit
def multiply(left_PR, right_RD, accumulated_PD, WIDEN: tl.constexpr):  # type: ignore[no-untyped-def]
    """Accumulated + left^T right, products exact and sums in float32."""
    if WIDEN:  # Triton's interpreter multiplies no bfloat16; the products are the same
        left_PR, right_RD = left_PR.to(tl.float32), right_RD.to(tl.float32)
    return tl.dot(left_PR, right_RD, accumulated_PD, input_precision="ieee")


@triton.jit
def finish(accumulated, out, index, PARTIAL: tl.constexpr):  # type: ignore[no-untyped-def]
    """Store a tile as program `index`'s partial tile, or its squared norm."""
    if PARTIAL:
        rows: tl.constexpr = accumulated.shape[0]
        columns: tl.constexpr = accumulated.shape[1]
        places = tl.arange(0, rows)[:, None] * columns + tl.arange(0, columns)[None, :]
        tl.store(out + index.to(tl.int64) * (rows * columns) + places, accumulated)
    else:
        tl.store(out + index, tl.sum(tl.sum(accumulated * accumulated, 1), 0))


@triton.jit
def add_and_square(partial, out, parts, chunks, SIZE: tl.constexpr, CHUNK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Partial tiles (N, parts, SIZE) to squares summed over chunks, (N, chunks)."""
    index = tl.program_id(0)
    tile, chunk = index // chunks, index % chunks
    places = partial + tile.to(tl.int64) * parts * SIZE + chunk * CHUNK + tl.arange(0, CHUNK)
    total = tl.zeros((CHUNK,), tl.float32)
    for _ in range(parts):
        total += tl.load(places)
        places += SIZE
    tl.store(out + index, tl.sum(total * total, 0))


def squared_norms(accumulate: Any, batch: int, tiles: int, size: int, parts: int, device: torch.device) -> Tensor:
    """Run a kernel that accumulates tiles, and square them.

    Args:
        accumulate: called with (out, PARTIAL); program number (example * tiles + tile) * parts + part calls `finish`.
        batch: B.
        tiles: tiles an example.
        size: entries of a tile.
        parts: parts that the sum behind a tile is shared out into.
        device: where.

    Returns:
        Shape (B,), float32, summed in float64.
    """
    if parts == 1:
        squares = torch.empty(batch, tiles, dtype=torch.float32, device=device)
        accumulate(squares, False)
    else:
        partial = torch.empty(batch * tiles, parts, size, dtype=torch.float32, device=device)
        accumulate(partial, True)
        chunk = min(CHUNK, size)
        chunks = size // chunk
        squares = torch.empty(batch, tiles * chunks, dtype=torch.float32, device=device)
        add_and_square[(batch * tiles * chunks,)](partial, squares, parts, chunks, SIZE=size, CHUNK=chunk, num_warps=4)
    return squares.sum(1, dtype=torch.float64).to(torch.float32)
