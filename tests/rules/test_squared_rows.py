"""Squared norms keep float32's precision however large the parameter: a norm too small clips too little."""

from __future__ import annotations

import pytest
import torch

from dither.rules.rule import squared_rows


@pytest.mark.parametrize("size", [0, 1, 1023, 1024, 1025, 2047, 2048, 12289, 2**22 + 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
def test_squares_of_any_size(size, dtype):
    torch.manual_seed(0)
    rows = torch.randn(2, size, dtype=dtype)
    wide = rows.to(torch.complex128 if dtype.is_complex else torch.float64)
    truth = wide.abs().square().sum(1)
    found = squared_rows(rows)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), truth, rtol=1e-6, atol=0)


def test_rows_are_not_mixed_and_need_not_be_contiguous():
    torch.manual_seed(0)
    rows = torch.randn(3, 9000)
    before = squared_rows(rows)
    rows[1, 8999] = float("nan")
    assert torch.equal(squared_rows(rows)[[0, 2]], before[[0, 2]])
    wide = torch.randn(9000, 3, dtype=torch.float64).mT
    torch.testing.assert_close(squared_rows(wide.unflatten(1, (90, 100))), wide.square().sum(1), rtol=1e-12, atol=0)
