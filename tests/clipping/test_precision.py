"""Half precision, mixed precision, extreme sizes: within the dtype's rounding of float32, and never above the bound."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dither
import oracle
from clipping.test_exactness import STRATEGIES, Function, loss_of, removal_moves

each_strategy = pytest.mark.parametrize("strategy", STRATEGIES)
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}
B = 4


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def network():
    return nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.LayerNorm(8), nn.Conv1d(6, 4, 3), nn.Linear(6, 4))


def reference(model, x):
    """Clipped sum at the median norm, and norms, by the oracle in float32."""
    truth = oracle.per_example_gradients(model, lambda: loss_of(model(x)))
    norms = oracle.norms(truth)
    return oracle.clipped_sum(truth, float(norms.median())), norms


@each_strategy
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models(dtype, strategy):
    """Eight roundings of slack for the five layers."""
    model, x = network(), torch.randn(B, 6, 8)
    expected, norms = reference(model, x)
    half = copy.deepcopy(model).to(dtype)
    result = dither.clipped_sum(
        half, lambda: loss_of(half(x.to(dtype)).float()), max_grad_norm=float(norms.median()), strategy=strategy
    )
    assert oracle.relative_error(result.gradients, expected) <= 8 * ROUNDING[dtype]
    torch.testing.assert_close(result.norms.double(), norms, rtol=8 * ROUNDING[dtype], atol=0)
    assert result.norms.dtype == torch.float32
    assert {g.dtype for g in result.gradients.values()} == {torch.float32}


@each_strategy
def test_autocast(strategy):
    model, x = network(), torch.randn(B, 6, 8)
    expected, norms = reference(model, x)

    def loss_fn():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return loss_of(model(x).float())

    result = dither.clipped_sum(model, loss_fn, max_grad_norm=float(norms.median()), strategy=strategy)
    assert oracle.relative_error(result.gradients, expected) <= 8 * ROUNDING[torch.bfloat16]
    assert {g.dtype for g in result.gradients.values()} == {torch.float32}


AUTOCAST = {
    "einsum": (lambda x, w: torch.einsum("btd,dp->btp", x, w), {"w": (8, 4)}),
    "batched product": (lambda x, w: torch.bmm(x.transpose(0, 1), w).transpose(0, 1), {"w": (6, 8, 4)}),
    "transposed weight": (lambda x, w: F.linear(x, w.t()), {"w": (8, 4)}),
    "transposed convolution": (lambda x, w: F.conv_transpose1d(x, w), {"w": (6, 3, 2)}),
    "prelu": (lambda x, w: F.prelu(x, w), {"w": (6,)}),
    "quotient": (lambda x, w, p: F.linear(x, w) / (p * p + 1), {"w": (4, 8), "p": (4,)}),
    "layer norm": (lambda x, w, p, q: F.layer_norm(F.linear(x, w), (4,), p, q), {"w": (4, 8), "p": (4,), "q": (4,)}),
    "rms norm": (lambda x, w, p: F.rms_norm(F.linear(x, w), (4,), p), {"w": (4, 8), "p": (4,)}),
    "attention": (lambda x, k: F.scaled_dot_product_attention(x, k.expand(4, -1, -1), x[:, :5]), {"k": (1, 5, 8)}),
}


@pytest.mark.parametrize("name", AUTOCAST)
def test_autocast_of_one_operation(name):
    """Against the oracle under the same autocast, whose gradients are rounded as well."""
    body, shapes = AUTOCAST[name]
    model, x = Function(body, **shapes), torch.randn(B, 6, 8)

    def loss_fn():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return loss_of(model(x).float())

    truth = oracle.per_example_gradients(model, loss_fn)
    bound = float(oracle.norms(truth).median())
    for strategy in STRATEGIES:
        result = dither.clipped_sum(model, loss_fn, max_grad_norm=bound, strategy=strategy)
        error = oracle.relative_error(result.gradients, oracle.clipped_sum(truth, bound))
        assert error <= 4 * ROUNDING[torch.bfloat16], strategy


@each_strategy
def test_parameters_of_several_dtypes(strategy):
    """float64 and float32 in one model: float32's rounding, and each gradient in its parameter's dtype."""
    torch.set_default_dtype(torch.float64)
    try:
        model, x = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4)), torch.randn(B, 6, 8)
        expected, norms = reference(model, x)
        mixed = copy.deepcopy(model)
        mixed[2].float()
        result = dither.clipped_sum(
            mixed,
            lambda: loss_of(mixed[2](mixed[:2](x).float()).double()),
            max_grad_norm=float(norms.median()),
            strategy=strategy,
        )
        assert oracle.relative_error(result.gradients, expected) <= 32 * ROUNDING[torch.float32]
        assert all(g.dtype == p.dtype for g, p in zip(result.gradients.values(), mixed.parameters(), strict=True))
    finally:
        torch.set_default_dtype(torch.float32)


@each_strategy
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [300.0, 3000.0])
def test_half_precision_norms_do_not_overflow(dtype, scale, strategy):
    """Entries fit float16, their squares and sums do not: the example keeps its place and is clipped to the bound."""
    model, x = nn.Linear(8, 7, bias=False).to(dtype), torch.ones(3, 8, dtype=dtype)
    weights = torch.tensor([scale, 0.01, 0.01])
    result = dither.clipped_sum(model, lambda: model(x).float().sum(1) * weights, strategy=strategy)
    # 56 entries, each the weight rounded to the dtype; their norm is float32.
    torch.testing.assert_close(result.norms.double(), 56**0.5 * weights.to(dtype).double(), rtol=1e-6, atol=0)
    assert result.dropped == 0
    one = removal_moves(model, lambda rows: model(x[rows]).float().sum(1) * weights[rows], 3, 0, 1.0, strategy)
    assert one == pytest.approx(1.0, rel=8 * ROUNDING[dtype])


@each_strategy
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("size", [1e-30, 1e-10, 1e10, 1e18])
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-10, 1.0, 1e10, 1e30])
def test_extreme_gradients_move_the_sum_by_at_most_the_bound(strategy, rows, size, scale):
    model, x = nn.Linear(3, 4), torch.randn(4, rows, 3)
    x[1] *= size
    weights = torch.tensor([1.0, scale, 1.0, 1.0])
    moved = removal_moves(model, lambda k: model(x[k]).flatten(1).sum(1) * weights[k], 4, 1, 0.3, strategy)
    assert moved <= 1 + 1e-5
    if 1e-3 < size * scale < 1e38:
        assert moved >= 1 - 1e-5  # it is clipped to the bound, not lost


def test_ghost_norms_survive_cancellation():
    model, x = nn.Linear(16, 16, bias=False), torch.randn(2, 64, 16)
    x[:, 32:] = x[:, :32]
    sign = torch.cat([torch.ones(32), -torch.ones(32)])[None, :, None] + 1e-4 * torch.randn(2, 64, 16)

    def loss_fn(net, dtype):
        return (net(x.to(dtype)) * sign.to(dtype) * 100).flatten(1).sum(1)

    double = copy.deepcopy(model).double()
    truth = oracle.norms(oracle.per_example_gradients(double, lambda: loss_fn(double, torch.float64)))
    ghost = dither.clipped_sum(model, lambda: loss_fn(model, torch.float32), strategy="ghost").norms.double()
    held = dither.clipped_sum(model, lambda: loss_fn(model, torch.float32), strategy="hold").norms.double()
    torch.testing.assert_close(ghost, truth, rtol=1e-3, atol=0)
    assert (ghost - truth).abs().max() <= 2 * (held - truth).abs().max() + 1e-4 * truth.max()


def test_clip_factors_of_losses_in_half_precision_are_not_rounded_upwards(double_precision):
    model, x = nn.Linear(5, 3), torch.randn(B, 6, 5)
    for strategy in STRATEGIES:
        for bound in (0.1, 0.2, 0.3, 0.37):
            for i in range(B):
                moved = removal_moves(model, lambda k: loss_of(model(x[k])).bfloat16(), B, i, bound, strategy)
                assert moved <= 1 + 1e-9, strategy


@each_strategy
def test_squares_that_underflow_before_they_are_multiplied_are_not_lost(strategy):
    model, x, weights = nn.Linear(16, 16, bias=False), torch.ones(2, 1, 16), torch.tensor([1e17, 1.0])
    x[0] *= 1e-23
    moved = removal_moves(model, lambda k: model(x[k]).flatten(1).sum(1) * weights[k], 2, 0, 1e-8, strategy)
    assert moved == pytest.approx(1.0, rel=1e-5)
