"""Weighted sums and squared norms of held gradients against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dither import kernels
from kernels.interpreted.small import DTYPES, EXACT, small_tiles, strided

assert small_tiles
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-11}
"""Relative error of rounding once. The interpreter truncates to bfloat16, the compiled kernel rounds (cvt.rn)."""
SHAPES = [(1,), (127,), (300,), (7, 43)]


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    st.sampled_from(DTYPES), st.sampled_from(DTYPES), st.integers(1, 9), st.sampled_from(SHAPES),
    st.integers(0, 2), st.integers(0, 1), st.booleans(),
)  # fmt: skip
def test_weighted_sum(dtype, into_dtype, batch, shape, layout, into_layout, masked):
    torch.manual_seed(0)
    held, weights = strided((batch, *shape), layout, dtype), torch.rand(batch, dtype=torch.float64).float()
    into = strided(shape, into_layout, into_dtype)
    kept = torch.arange(batch) % 3 != 1 if masked else None
    rows = slice(None) if kept is None else kept
    used, factors = held[rows].double().flatten(1), weights[rows].double()
    expected = into.double() + (factors @ used).view(shape)
    size = into.double().abs() + (factors @ used.abs()).view(shape)
    if kept is not None:  # what is left out may hold anything
        held[~kept], weights[~kept] = float("nan"), float("inf")
    kernels.add_weighted(held, weights, into, kept)
    rounding = ROUNDING[into_dtype] * (1 if into.is_contiguous() else 2)  # another layout is added by a second rounding
    assert bool(((into.double() - expected).abs() <= rounding * size + EXACT * size).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("P", [1, 129, 1024, 2500])
def test_squares(dtype, P):
    torch.manual_seed(0)
    held = torch.randn(3, P).to(dtype)
    clean = kernels.squared_rows(held)
    torch.testing.assert_close(clean.double(), held.double().square().sum(1), rtol=EXACT, atol=0)
    held[1, P - 1] = float("inf")
    found = kernels.squared_rows(held)
    assert found.dtype == torch.float32
    assert found[1].isinf() and torch.equal(found[[0, 2]], clean[[0, 2]])
