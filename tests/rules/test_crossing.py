"""Norms of several uses from the products of their rows: against the formed gradients, and without needless work."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import dither
from dither.rules.crossing import RowFactors, crossed_norm

B, V, D = 3, 30, 5


def looked_up(rows):
    return RowFactors(torch.randint(V, (B, rows)), torch.randn(B, rows, D, dtype=torch.float64))


def dense(rows):
    return RowFactors(torch.randn(B, rows, V, dtype=torch.float64), torch.randn(B, rows, D, dtype=torch.float64))


def formed(rows):
    left = torch.nn.functional.one_hot(rows.left, V).double() if rows.looked_up else rows.left
    return left.mT @ rows.right


class Work(TorchDispatchMode):
    """Elements that matrix products made inside, and how often tensors were joined."""

    made = joined = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        self.made += output.numel() if func.overloadpacket is torch.ops.aten.bmm else 0
        self.joined += func.overloadpacket is torch.ops.aten.cat
        return output


@pytest.mark.parametrize("rows", [1, 7, 50, 200, 333])
def test_as_the_formed_gradients(rows):
    for uses in ([dense(rows)], [looked_up(rows)], [dense(rows), looked_up(9), dense(2)], [looked_up(rows), dense(1)]):
        wanted = sum(formed(use) for use in uses).square().sum((1, 2))
        assert torch.allclose(crossed_norm(uses), wanted, rtol=1e-10)


def test_symmetric_products_are_taken_once_and_a_single_list_is_not_copied():
    rows = 400
    with Work() as work:
        crossed_norm([dense(rows)])
    assert work.joined == 0
    assert work.made <= 0.65 * 2 * B * rows * rows  # of left and right factors


def test_sequences_of_no_rows():
    assert crossed_norm([dense(0), dense(0)]) is None  # nothing to multiply: the zeros themselves are taken
    layer, x = torch.nn.Linear(4, 4), torch.randn(3, 0, 4)
    total = dither.clipped_sum(layer, lambda: layer(layer(x)).sum((1, 2)) + 0.0)
    assert not total.norms.any() and not any(gradient.any() for gradient in total.gradients.values())
