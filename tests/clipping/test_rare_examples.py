"""Under a budget, examples that are not finite, overflow or cancel are as exact as without, and form nothing large."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import dither
import oracle

B = 6
STRATEGIES = ("auto", "ghost", "tile", "two_pass")


class Largest(TorchDispatchMode):
    """The largest tensor that an operation made inside, bytes."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        if isinstance(output, torch.Tensor):
            self.bytes = max(self.bytes, output.untyped_storage().nbytes())
        return output


class Layers(nn.Module):
    """A convolution, a product on the left, a linear layer twice, and one more."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(5, 7, 3, bias=False)
        self.left = nn.Parameter(torch.randn(4, 8))
        self.twice = nn.Linear(7, 7, bias=False)
        self.last = nn.Linear(7, 3, bias=False)

    def forward(self, x):
        h = (self.left @ self.conv(x).mT.tanh()).tanh()
        return self.last(self.twice(self.twice(h).tanh()))


def layers():
    model, x, scale = Layers(), torch.randn(B, 5, 10), torch.ones(B)
    return model, x, scale, lambda: model(x).square().mean((1, 2)) * scale


def linear():
    model, x, scale = nn.Linear(5, 4, bias=False), torch.randn(B, 3, 5), torch.ones(B)
    return model, x, scale, lambda: model(x).square().mean((1, 2)) * scale


def embedding():
    model, ids, scale = nn.Embedding(40, 6), torch.randint(40, (B, 7)), torch.ones(B)
    return model, None, scale, lambda: model(ids).tanh().sum((1, 2)) * scale


def tied():
    model, ids, scale = nn.Embedding(40, 6), torch.randint(40, (B, 7)), torch.ones(B)
    return model, None, scale, lambda: F.linear(model(ids).tanh(), model.weight).square().mean((1, 2)) * scale


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("case", [layers, linear, embedding, tied])
@pytest.mark.parametrize(
    ("wrong", "dropped"),
    [
        ({"scale": {1: float("nan")}}, 1),
        ({"scale": {1: float("inf"), 4: float("nan")}}, 2),
        ({"x": {2: float("nan")}}, 1),
        ({"x": {2: float("inf")}, "scale": {2: 0.0}}, 1),
        ({"scale": {3: 1e25}}, 0),  # the square overflows, the gradient does not
        ({"scale": {3: 1e25, 0: float("inf")}, "x": {5: float("nan")}}, 2),
    ],
)
def test_as_without_a_budget(case, wrong, dropped, strategy):
    torch.manual_seed(0)
    model, x, scale, loss_fn = case()
    for i, value in wrong.get("scale", {}).items():
        scale[i] = value
    for i, value in wrong.get("x", {}).items():
        if x is None:
            scale[i] = value
        else:
            x[i, 0] = value
    free = dither.clipped_sum(model, loss_fn, strategy="hold")
    bound = dither.clipped_sum(model, loss_fn, strategy=strategy, memory_budget=0)
    assert {use.strategy for use in bound.plan.uses} <= {"ghost", "tile", "cross"}
    assert bound.dropped == free.dropped == dropped
    finite = free.norms.isfinite()
    assert torch.equal(finite, bound.norms.isfinite())
    assert torch.allclose(bound.norms[finite], free.norms[finite], rtol=1e-5)
    assert oracle.relative_error(bound.gradients, free.gradients) <= 1e-5


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("value", [float("inf"), 1e25])
def test_the_gradients_of_the_batch_are_not_formed(strategy, value):
    table, ids, scale = nn.Embedding(5000, 16), torch.randint(5000, (B, 7)), torch.ones(B)
    scale[0] = value

    def loss_fn():
        return table(ids).sum((1, 2)) * scale

    with Largest() as largest:
        dither.clipped_sum(table, loss_fn, strategy=strategy, memory_budget=0)
    assert largest.bytes <= 5000 * 16 * 8  # one, in float64
    with Largest() as largest:
        dither.clipped_sum(table, loss_fn, strategy=strategy, memory_budget=B * 5000 * 16 * 4)
    assert largest.bytes >= B * 5000 * 16 * 4  # where there is room, at once


@pytest.mark.parametrize("strategy", ["ghost", "tile", "two_pass"])
@pytest.mark.parametrize("several", [False, True])
def test_rows_that_cancel(strategy, several):
    torch.manual_seed(0)
    layer = nn.Linear(64, 64, bias=False)
    x, scale = torch.randn(1, 64, 64), torch.randn(1, 64, 64) * 1e3
    y = x + 1e-6 * torch.randn_like(x)
    rows, signs = torch.cat([x, y], 1), torch.cat([scale, -scale], 1)

    def loss_fn():  # the two gradients are all but opposite
        return ((layer(x) - layer(y)) * scale).sum((1, 2)) if several else (layer(rows) * signs).sum((1, 2))

    with Largest() as largest:
        result = dither.clipped_sum(layer, loss_fn, max_grad_norm=0.1, strategy=strategy, memory_budget=0)
    free = dither.clipped_sum(layer, loss_fn, max_grad_norm=0.1, strategy=strategy)
    assert float(result.gradients["weight"].norm()) <= 0.1 * (1 + 1e-5)
    assert float(result.gradients["weight"].norm()) >= 0.1 * (1 - 1e-5)
    assert oracle.relative_error(result.gradients, free.gradients) <= 0.1  # rounding is all that is left of them
    assert largest.bytes < 1e9
