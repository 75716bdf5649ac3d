"""Tile norms of linear maps against float64."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dither import kernels
from kernels.interpreted.small import DTYPES, assert_norms, small_tiles, strided

assert small_tiles
layouts = st.integers(0, 2)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    st.sampled_from(DTYPES), st.integers(1, 3), st.sampled_from([1, 15, 16, 33, 70]), st.integers(1, 37),
    st.integers(1, 37), layouts, layouts,
)  # fmt: skip
def test_any_shape_and_strides(dtype, batch, T, d, p, x_layout, g_layout):
    torch.manual_seed(0)
    x, g = strided((batch, T, d), x_layout, dtype), strided((batch, T, p), g_layout, dtype)
    wide_x, wide_g = x.double(), g.double()
    assert_norms(kernels.tile_norm(x, g), wide_g.mT @ wide_x, wide_g.mT.abs() @ wide_x.abs())


def test_many_rows_are_shared_out():
    torch.manual_seed(0)
    x, g = torch.randn(2, 530, 20), torch.randn(2, 530, 20)
    from dither.kernels import reduction

    assert reduction.split(530, 2 * 4, 16) == (17, 32)
    assert reduction.split(530, reduction.PROGRAMS, 16)[0] == 1
    first = kernels.tile_norm(x, g)
    assert_norms(first, g.double().mT @ x.double(), g.double().abs().mT @ x.double().abs())
    assert torch.equal(first, kernels.tile_norm(x, g))


def test_what_is_not_finite_stays_in_its_example():
    torch.manual_seed(0)
    x, g = torch.randn(4, 40, 20), torch.randn(4, 40, 18)
    clean = kernels.tile_norm(x, g)
    x[1, 39, 19], g[2, 0, 17] = float("nan"), float("inf")
    found = kernels.tile_norm(x, g)
    assert not found[[1, 2]].isfinite().any()
    assert torch.equal(found[[0, 3]], clean[[0, 3]])


def test_one_example_more_changes_no_other():
    torch.manual_seed(0)
    x, g = torch.randn(5, 33, 20), torch.randn(5, 33, 18)
    assert torch.equal(kernels.tile_norm(x, g)[:3], kernels.tile_norm(x[:3], g[:3]))
