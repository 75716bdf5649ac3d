"""Small tiles, so that small tensors take several, and the cost of the interpreter stays small."""

from __future__ import annotations

import os

import pytest
import torch

from dither import kernels
from dither.kernels import reduction, tiles

assert os.environ.get("TRITON_INTERPRET") == "1", "run by tests/kernels/test_interpreted.py"

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EXACT = 1e-6
"""Relative error of sums of exact products in float32."""


@pytest.fixture(scope="module", autouse=True)
def small_tiles():
    """Every entry overridden; sums are shared out from 32 rows on."""
    table, rows = dict(tiles.TABLE), reduction.SPLIT_ROWS
    for key in table:
        whole = key[2] in ("weighted sum", "squares")
        tiles.TABLE[key] = tiles.Tiles(4, 1, 128, 4, 1) if whole else tiles.Tiles(16, 16, 16, 4, 2)
    reduction.SPLIT_ROWS = 32
    yield
    tiles.TABLE.update(table)
    reduction.SPLIT_ROWS = rows


def strided(shape: tuple[int, ...], layout: int, dtype: torch.dtype) -> torch.Tensor:
    """Random numbers: contiguous (0), axes reversed in memory (1), every second entry of a larger tensor (2)."""
    if layout == 0:
        return torch.randn(shape).to(dtype)
    if layout == 1:
        return torch.randn(shape[::-1]).to(dtype).permute(*reversed(range(len(shape))))
    return torch.randn([2 * n for n in shape]).to(dtype)[tuple(slice(1, None, 2) for _ in shape)]


def assert_norms(found: torch.Tensor, gradients: torch.Tensor, sizes: torch.Tensor) -> None:
    """Squared norms (B,) against float64 gradients; `sizes` are the same sums of absolute values, what can round."""
    truth, size = gradients.flatten(1).square().sum(1), sizes.flatten(1).square().sum(1)
    assert found.dtype == torch.float32
    assert bool(((found.double() - truth).abs() <= EXACT * (truth * size).sqrt() + EXACT**2 * size).all())


assert kernels.serve(torch.ones(1))
