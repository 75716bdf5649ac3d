"""The rules on the kernels: clipped sums of models against one example at a time."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import dither
import oracle
from dither import kernels

STRATEGIES = ("hold", "tile", "two_pass")


def network() -> nn.Module:
    """Each kind of use that a kernel takes: (B, 4, 9, 8) to (B, 5)."""
    return nn.Sequential(
        nn.Conv2d(4, 6, (3, 2), stride=2, padding=1, groups=2),
        nn.Tanh(),
        nn.ConvTranspose2d(6, 4, 3, stride=2, output_padding=1, padding=2),
        nn.Flatten(2),
        nn.Conv1d(4, 3, 5, padding="same", dilation=2),
        nn.Tanh(),
        nn.LazyLinear(7),
        nn.Flatten(),
        nn.Linear(21, 5),
    )


@pytest.fixture
def used(monkeypatch):
    """Which kernels ran, in order; they run as usual."""
    found: list[str] = []
    for name in ("tile_norm", "convolution_tile_norm", "add_weighted", "squared_rows"):
        kernel = getattr(kernels, name)

        def noted(*args, name=name, kernel=kernel):
            found.append(name)
            return kernel(*args)

        monkeypatch.setattr(kernels, name, noted)
    return found


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_clipped_sums(strategy, used):
    torch.manual_seed(0)
    model, x = network(), torch.randn(4, 4, 9, 8)
    model(x)

    def loss_fn():
        return model(x).square().sum(1)

    truth = oracle.per_example_gradients(model, loss_fn)
    norms = oracle.norms(truth)
    bound = float(norms.median())
    used.clear()
    result = dither.clipped_sum(model, loss_fn, max_grad_norm=bound, strategy=strategy)
    torch.testing.assert_close(result.norms.double(), norms, rtol=1e-5, atol=0)
    assert oracle.relative_error(result.gradients, oracle.clipped_sum(truth, bound)) <= 1e-5
    assert {"add_weighted", "squared_rows"} <= set(used)
    if strategy == "tile":
        assert used.count("convolution_tile_norm") == 3 and used.count("tile_norm") == 1


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_example_that_is_not_finite_is_dropped(strategy, value):
    torch.manual_seed(0)
    model, x = network(), torch.randn(4, 4, 9, 8)
    model(x)
    others = dither.clipped_sum(model, lambda: model(x[1:]).square().sum(1), strategy=strategy)
    x[0, 1, 2, 3] = value
    result = dither.clipped_sum(model, lambda: model(x).square().sum(1), strategy=strategy)
    assert result.dropped == 1
    assert oracle.relative_error(result.gradients, others.gradients) <= 1e-5


def test_float64_keeps_the_ordinary_way(used):
    model, x = nn.Linear(3, 4).double(), torch.randn(5, 2, 3, dtype=torch.float64)
    dither.clipped_sum(model, lambda: model(x).square().sum((1, 2)), strategy="tile")
    assert used == []
    assert not kernels.serve(x) and not kernels.serve(torch.ones(2), torch.ones(2, dtype=torch.complex64))
    assert not kernels.serve(torch.ones(0, 3)) and not kernels.serve(torch.ones(2, device="meta"))


def test_memory_that_is_not_the_numbers_is_declined():
    negated = torch.ones(2, dtype=torch.complex64).conj().imag
    assert negated.is_neg() and not kernels.serve(negated)
    assert not kernels.serve(torch.ones(2, 2).to_sparse())
    assert not kernels.serve(torch._efficientzerotensor(2))
    assert kernels.serve(torch.ones(2), nn.Parameter(torch.ones(2)))
