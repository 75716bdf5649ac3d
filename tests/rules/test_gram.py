"""Gram matrices by blocks up to the diagonal."""

from __future__ import annotations

import pytest
import torch

from dither.rules import crossing, linear


@pytest.mark.parametrize("rows", [2, 15, 16, 17, 49, 64, 100, 257])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_norm_is_that_of_the_gradient(rows, dtype):
    x, g = torch.randn(3, rows, 7, dtype=dtype) + 1.0, torch.randn(3, rows, 5, dtype=dtype)
    formed = torch.bmm(g.double().mT, x.double()).square().sum((1, 2))
    found = linear.outer_ghost_norm(x, g)
    torch.testing.assert_close(found.double(), formed, rtol=1e-12 if dtype == torch.float64 else 1e-5, atol=0)


def test_blocks_are_bounded_in_memory(monkeypatch):
    monkeypatch.setattr(crossing, "GRAM_ELEMENTS", 3 * 100 * 4)
    assert crossing.gram_rows(3, 100) == 4
    x, g = torch.randn(3, 100, 7, dtype=torch.float64), torch.randn(3, 100, 5, dtype=torch.float64)
    formed = torch.bmm(g.mT, x).square().sum((1, 2))
    torch.testing.assert_close(linear.outer_ghost_norm(x, g), formed, rtol=1e-12, atol=0)


def test_rows_that_cancel_are_taken_in_tiles():
    x = torch.randn(2, 1, 6).repeat(1, 40, 1)
    g = torch.randn(2, 20, 5)
    g = torch.cat([g, -g], 1) + 1e-2 * torch.randn(2, 40, 5)
    formed = torch.bmm(g.double().mT, x.double()).square().sum((1, 2))
    torch.testing.assert_close(linear.outer_ghost_norm(x, g).double(), formed, rtol=1e-4, atol=0)


@pytest.mark.parametrize("norm", [linear.outer_ghost_norm, linear.outer_tile_norm])
def test_rows_that_cancel_further_have_to_be_formed(norm):
    x, g = torch.randn(2, 1, 6).repeat(1, 40, 1), torch.randn(2, 20, 5)
    assert norm(x, torch.cat([g, -g], 1) + 1e-5 * torch.randn(2, 40, 5)) is None
