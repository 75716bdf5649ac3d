"""Accumulation, memory kept between steps, plans, verification, rows per example, changing batch sizes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import dither
import oracle
from dither import errors


def mlp(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.LayerNorm(7), nn.Linear(7, 3)).to(dtype)


def test_into_adds_in_place_over_micro_batches():
    model, x = mlp(), torch.randn(6, 4, 5, dtype=torch.float64)
    whole = dither.clipped_sum(model, lambda: model(x).square().flatten(1).sum(1))
    sums = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    for part in x.split(4):
        result = dither.clipped_sum(model, lambda part=part: model(part).square().flatten(1).sum(1), into=sums)
        assert result.gradients is sums
    assert oracle.relative_error(sums, whole.gradients) <= 1e-12


def test_results_do_not_share_memory_between_steps():
    model, x = mlp(), torch.randn(2, 3, 4, 5, dtype=torch.float64)
    first = dither.per_example_gradients(model, lambda: model(x[0]).square().flatten(1).sum(1))
    kept = {n: g.clone() for n, g in first.items()}
    dither.per_example_gradients(model, lambda: model(x[1]).square().flatten(1).sum(1))
    assert all(torch.equal(first[n], kept[n]) for n in kept)


def test_grad_of_parameters_and_inputs_is_left_alone():
    model, x = mlp(), torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    dither.clipped_sum(model, lambda: model(x).sum(1))
    assert x.grad is None and torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight))
    assert model[3].weight.grad is None


def test_outputs_that_no_loss_reached_before_are_decided_when_one_does():
    """adaLN-Zero and dead units: a path may carry its first gradient after the layouts were kept."""

    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.use_b = nn.Linear(5, 3), nn.Linear(5, 3), False

        def forward(self, x):
            b = self.b(x)
            return self.a(x) + (b if self.use_b else b.detach())

    model, x = Gated().double(), torch.randn(3, 3, 5, dtype=torch.float64).transpose(0, 1)

    def loss_fn():
        return model(x).square().flatten(1).sum(1)

    for use_b in (False, True):
        model.use_b = use_b
        truth = oracle.per_example_gradients(model, loss_fn)
        assert oracle.relative_error(dither.per_example_gradients(model, loss_fn), truth) <= 1e-12


def test_rows_per_example_is_checked_against_what_is_found():
    model, x = mlp(), torch.randn(4, 5, dtype=torch.float64)

    def consecutive():
        return model(x.repeat_interleave(3, 0)).square().sum(1).view(4, 3).mean(1)

    def interleaved():
        return model(x.repeat(3, 1)).square().sum(1).view(3, 4).mean(0)

    for loss_fn in (consecutive, interleaved):  # both are exact without the declaration
        truth = oracle.clipped_sum(oracle.per_example_gradients(model, loss_fn), 0.1)
        assert oracle.relative_error(dither.clipped_sum(model, loss_fn, max_grad_norm=0.1).gradients, truth) <= 1e-12
    dither.clipped_sum(model, consecutive, rows_per_example=3)
    with pytest.raises(errors.ExampleAxisError, match="rows"):
        dither.clipped_sum(model, interleaved, rows_per_example=3)
    with pytest.raises(errors.ExampleAxisError, match="rows"):
        dither.clipped_sum(model, consecutive, rows_per_example=2)


def test_a_memory_budget_turns_holding_off():
    model, x = nn.Linear(64, 64), torch.randn(4, 128, 64)

    def loss_fn():
        return model(x).square().flatten(1).sum(1)

    free = dither.clipped_sum(model, loss_fn)
    bound = dither.clipped_sum(model, loss_fn, memory_budget=4 * 64 * 4)  # the bias's
    assert sum(u.held_bytes for u in bound.plan.uses) == 4 * 64 * 4
    assert "hold" in {u.strategy for u in free.plan.uses if u.parameter == "weight"}
    assert {u.strategy for u in bound.plan.uses if u.parameter == "weight"} <= {"ghost", "tile"}
    assert "weight" in str(free.plan) and "MiB" in str(free.plan)
    assert oracle.relative_error(bound.gradients, free.gradients) <= 1e-5


def test_verify_reports_exact_and_finds_a_wrong_rule(monkeypatch):
    model, x = mlp(), torch.randn(3, 4, 5, dtype=torch.float64)
    dropout = nn.Sequential(model, nn.Dropout(0.5))

    def loss_fn():
        return dropout(x).square().flatten(1).sum(1)

    before = torch.get_rng_state()
    report = dither.verify(dropout, loss_fn)
    assert report.exact and report.max_relative_error <= 1e-12 and report.examples == 3 and "exact" in str(report)
    torch.set_rng_state(before)
    from dither.rules.linear import LinearWeight

    right = LinearWeight.per_example_gradient
    monkeypatch.setattr(LinearWeight, "per_example_gradient", lambda *a, **k: right(*a, **k) * 1.001)
    assert not dither.verify(dropout, loss_fn).exact


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 6),
    rows=st.integers(1, 6),
    width=st.integers(1, 5),
    channels=st.sampled_from([1, 2, 4]),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 3),
    padding=st.integers(0, 2),
    time_first=st.booleans(),
    strategy=st.sampled_from(["auto", "hold", "ghost", "tile", "two_pass"]),
)
def test_any_shape(batch, rows, width, channels, kernel, stride, padding, time_first, strategy):
    torch.manual_seed(batch * 1000 + rows * 100 + width)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(channels, 4, kernel, stride, padding, groups=channels)
            self.linear, self.table = nn.Linear(4, width), nn.Embedding(5, width)
            self.position = nn.Parameter(torch.randn(rows, 1, width))

        def forward(self, image, ids):
            h = F.gelu(self.conv(image)).flatten(2).mean(2)  # (B, 4)
            h = self.linear(h)[:, None] + self.table(ids)  # (B, rows, width)
            h = h.transpose(0, 1) + self.position  # (rows, B, width)
            return h.tanh() if time_first else h.transpose(0, 1).sin().transpose(0, 1)

    model = Net().double()
    image, ids = torch.randn(batch, channels, 4, 5, dtype=torch.float64), torch.randint(5, (batch, rows))

    def loss_fn():
        return model(image, ids).square().sum((0, 2))

    truth = oracle.per_example_gradients(model, loss_fn)
    bound = float(oracle.norms(truth).median())
    result = dither.clipped_sum(model, loss_fn, max_grad_norm=bound, strategy=strategy)
    assert oracle.relative_error(result.gradients, oracle.clipped_sum(truth, bound)) <= 1e-10


@pytest.mark.parametrize("inputs", [(4, 3), (4, 5, 3), (4, 2, 5, 3)])
def test_an_in_place_operation_after_a_later_layer_of_several_rows(inputs):
    """The output of such a layer is a view, whose graph node an in-place operation replaces."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 2)).double()
    x = torch.randn(*inputs, dtype=torch.float64)
    truth = oracle.per_example_gradients(model, lambda: model(x).square().flatten(1).sum(1))
    assert truth["1.weight"].any()
    ours = dither.per_example_gradients(model, lambda: model(x).square().flatten(1).sum(1))
    assert oracle.relative_error(ours, truth) <= 1e-10
