"""The planner: the cheapest way by the machine's rates, a budget that is kept or refused, a plan that is kept."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dither
import oracle
from dither import errors
from dither.clipping import machine
from dither.clipping.gradients import Gradients
from dither.clipping.plan import predicted
from dither.clipping.recording import Recording
from dither.rules.rule import Cost


def strategies(plan):
    return {use.parameter: use.strategy for use in plan.uses}


class Tied(nn.Module):
    """A table that is looked up, and used as the last layer."""

    def __init__(self, rows, width, padding=None):
        super().__init__()
        self.table, self.middle = nn.Embedding(rows, width, padding_idx=padding), nn.Linear(width, width)
        self.head = nn.Linear(width, rows, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids):
        return self.head(self.middle(self.table(ids)).tanh())


class Loop(nn.Module):
    """One layer, four times."""

    def __init__(self, width):
        super().__init__()
        self.layer = nn.Linear(width, width)

    def forward(self, x):
        for _ in range(4):
            x = self.layer(x).tanh()
        return x


def tied_case(dtype, rows=50, padding=None):
    model = Tied(rows, 8, padding).to(dtype)
    ids = torch.randint(rows, (5, 7))
    ids[:, 0], ids[0, :] = 0, 3  # repeated, and the padding
    return model, lambda: model(ids).square().flatten(1).mean(1)


def loop_case(dtype, width=6):
    model, x = Loop(width).to(dtype), torch.randn(4, 5, width, dtype=dtype)
    return model, lambda: model(x).square().flatten(1).mean(1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", [tied_case, lambda dtype: tied_case(dtype, padding=0), loop_case])
def test_products_across_uses_give_the_norm_of_their_sum(case, dtype):
    model, loss_fn = case(dtype)
    crossed = dither.clipped_sum(model, loss_fn, max_grad_norm=0.01, strategy="ghost")
    formed = dither.clipped_sum(model, loss_fn, max_grad_norm=0.01, strategy="hold")
    assert "cross" in strategies(crossed.plan).values() and "cross" not in strategies(formed.plan).values()
    bound = 1e-10 if dtype == torch.float64 else 1e-5
    assert torch.allclose(crossed.norms, formed.norms, rtol=bound, atol=0)
    assert oracle.relative_error(crossed.gradients, formed.gradients) <= bound


def test_uses_that_cancel_keep_the_bound():
    layer = nn.Linear(64, 64, bias=False)
    x, scale = torch.randn(1, 64, 64), torch.randn(1, 64, 64) * 1e3
    y = x + 1e-6 * torch.randn_like(x)

    def loss_fn():  # the two gradients are all but opposite
        return ((layer(x) - layer(y)) * scale).sum((1, 2))

    for strategy in ("ghost", "tile", "two_pass"):
        result = dither.clipped_sum(layer, loss_fn, max_grad_norm=0.1, strategy=strategy)
        assert set(strategies(result.plan).values()) == {"cross"}
        assert float(result.gradients["weight"].norm()) <= 0.1 * (1 + 1e-5)


def test_products_that_float32_cannot_hold_are_not_taken_for_zero():
    layer = nn.Linear(8, 8, bias=False)
    x, scale = torch.randn(6, 8) * 1e18, torch.randn(6, 8) * 1e-23

    def loss_fn():
        return ((layer(x) + layer(x.flip(-1))) * scale).sum(1)

    formed = dither.clipped_sum(layer, loss_fn, max_grad_norm=1e-6, strategy="hold")
    for strategy in ("ghost", "tile", "two_pass"):
        result = dither.clipped_sum(layer, loss_fn, max_grad_norm=1e-6, strategy=strategy)
        assert torch.allclose(result.norms, formed.norms, rtol=1e-5, atol=0) and float(result.norms.min()) > 0
        assert oracle.relative_error(result.gradients, formed.gradients) <= 1e-5


@pytest.mark.parametrize("strategy", ["auto", "hold", "ghost", "tile", "two_pass"])
def test_what_lies_behind_a_computed_tensor_is_part_of_what_a_plan_is_kept_for(strategy, double_precision):
    class Switched(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Parameter(torch.randn(24, 24)), nn.Parameter(torch.randn(24, 24))
            self.chosen = "second"

        def forward(self, x):
            return F.linear(F.linear(x, self.first).tanh(), getattr(self, self.chosen) * 2)

    model, x = Switched(), torch.randn(6, 5, 24)
    for model.chosen in ("second", "second", "second", "second", "first"):
        truth = oracle.per_example_gradients(model, lambda: model(x).square().mean((1, 2)))
        bound = float(oracle.norms(truth).median())
        result = dither.clipped_sum(
            model, lambda: model(x).square().mean((1, 2)), max_grad_norm=bound, strategy=strategy
        )
        assert oracle.relative_error(result.gradients, oracle.clipped_sum(truth, bound)) <= 1e-10


def test_a_use_that_is_reached_later_is_not_multiplied(double_precision):
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(24, 24))

        def forward(self, x):
            open_one = F.linear(x, self.weight).square().mean((1, 2))
            return open_one + F.relu((x.unsqueeze(-2) * self.weight).square().mean((1, 2, 3)) - 1e4)

    model, x = Gated(), torch.randn(6, 5, 24)
    for scale in (1, 1, 1, 1000):
        result = dither.clipped_sum(model, lambda s=scale: model(x * s), strategy="ghost", max_grad_norm=1e9)
        truth = oracle.per_example_gradients(model, lambda s=scale: model(x * s))
        assert oracle.relative_error(result.gradients, oracle.clipped_sum(truth, 1e9)) <= 1e-10


class InPlace(torch.autograd.Function):
    """Changes its gradient in place, which torch forbids and people do."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return gradient.mul_(100.0)


@pytest.mark.parametrize("strategy", ["auto", "hold", "ghost", "tile", "two_pass"])
@pytest.mark.parametrize("shape", [(1, 8), (1, 3, 8)])
def test_a_gradient_changed_in_place_after_its_norm_never_exceeds_the_bound(strategy, shape):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.outer = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(8, 8))
            self.bias = nn.Parameter(torch.randn(8))

        def forward(self, x):
            return InPlace.apply(F.linear(x * 1e-6, self.inner) + 0) + F.linear(x, self.outer) + self.bias

    model, x = Model(), torch.randn(shape) * 1e-3
    try:
        result = dither.clipped_sum(model, lambda: model(x).square().flatten(1).sum(1), strategy=strategy)
    except errors.SavedInputChangedError as error:
        assert "in place during the backward pass" in str(error)
    else:
        assert float(sum(g.square().sum() for g in result.gradients.values()).sqrt()) <= 1 + 1e-5


def test_a_large_table_that_is_tied_is_never_formed():
    model = Tied(20_000, 16)
    ids = torch.randint(20_000, (4, 6))
    result = dither.clipped_sum(model, lambda: model(ids).logsumexp(-1).mean(1))
    assert strategies(result.plan)["table.weight"] == "cross"
    assert sum(use.held_bytes for use in result.plan.uses if use.parameter == "table.weight") == 0


def test_a_budget_gives_up_what_costs_the_least_time():
    model = nn.Sequential(nn.Linear(96, 128), nn.Tanh(), nn.Linear(128, 96))
    x = torch.randn(4, 200, 96)

    def loss_fn():
        return model(x).square().flatten(1).mean(1)

    free = dither.clipped_sum(model, loss_fn)
    assert strategies(free.plan)["0.weight"] == strategies(free.plan)["2.weight"] == "hold"
    one = 4 * 96 * 128 * 4
    half = dither.clipped_sum(model, loss_fn, memory_budget=one + 8192)
    assert sorted(strategies(half.plan)[f"{i}.weight"] == "hold" for i in (0, 2)) == [False, True]
    assert sum(use.held_bytes for use in half.plan.uses) <= one + 8192
    assert oracle.relative_error(half.gradients, free.gradients) <= 1e-5


@pytest.mark.parametrize("strategy", ["auto", "ghost", "tile", "two_pass"])
def test_a_budget_that_cannot_be_kept_is_refused_with_the_numbers(strategy):
    weight = nn.Parameter(torch.randn(30, 30))
    holder = nn.ParameterList([weight])
    x = torch.randn(4, 5, 30)

    def loss_fn():
        return (x @ (weight @ weight.T)).square().flatten(1).mean(1)

    with pytest.raises(errors.MemoryBudgetError, match=r"100 bytes.*14,400"):
        dither.clipped_sum(holder, loss_fn, memory_budget=100, strategy=strategy)
    dither.clipped_sum(holder, loss_fn, memory_budget=20_000, strategy=strategy)


class Made(nn.Module):
    """Parameters of the given shapes, and a forward that takes them."""

    def __init__(self, body, *shapes):
        super().__init__()
        self.body, self.held = body, nn.ParameterList(nn.Parameter(torch.randn(shape)) for shape in shapes)

    def forward(self, x):
        return self.body(x, *self.held)


@pytest.mark.parametrize("strategy", ["auto", "ghost", "tile", "two_pass"])
@pytest.mark.parametrize(
    ("body", "shapes"),
    [
        (lambda x, p: x + p[:, :5], [(1, 40, 6)]),  # a slice: the whole table is held
        (lambda x, p: (x + p[:, :5]) * p[:, 5:10], [(1, 40, 6)]),  # once, whatever is taken of it
        (lambda x, w: x * w, [(5, 6)]),
        (lambda x, w, b: F.layer_norm(x, (6,), w, b), [(6,), (6,)]),
        (lambda x, w: F.prelu(x, w), [(5,)]),
        (lambda x, w: torch.cat([x, w.expand(4, 3, 6)], 1), [(1, 3, 6)]),
        (lambda x, w: torch.cdist(x, w), [(30, 6)]),  # without a rule
        (lambda x, w: F.linear(x * w, w.view(1, -1)), [(6,)]),
    ],
)
def test_what_has_no_other_way_is_counted_and_refused(body, shapes, strategy):
    model, x = Made(body, *shapes), torch.randn(4, 5, 6)
    needed = 4 * 4 * sum(p.numel() for p in model.parameters())

    def loss_fn():
        return model(x).square().flatten(1).sum(1)

    with pytest.raises(errors.MemoryBudgetError, match=f"is {needed - 1:,} bytes.*take {needed:,}:"):
        dither.clipped_sum(model, loss_fn, strategy=strategy, memory_budget=needed - 1)
    kept = dither.clipped_sum(model, loss_fn, strategy=strategy, memory_budget=needed)
    assert sum(use.held_bytes for use in kept.plan.uses) == needed
    truth = oracle.per_example_gradients(model, loss_fn)
    assert oracle.relative_error(kept.gradients, oracle.clipped_sum(truth, 1.0)) <= 1e-5


def test_small_parameters_leave_the_default_plan_as_it_was():
    model, x = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 64)), torch.randn(4, 100, 64)
    plan = dither.clipped_sum(model, lambda: model(x).square().mean((1, 2))).plan
    assert set(strategies(plan).values()) == {"hold"}


@pytest.mark.parametrize("strategy", ["auto", "hold", "ghost", "tile", "two_pass"])
def test_the_uses_of_one_parameter_are_planned_together_and_run_as_planned(strategy):
    table, ids = nn.Embedding(500, 16), torch.randint(500, (4, 300))

    def loss_fn():
        return F.linear(table(ids).tanh(), table.weight).square().mean((1, 2))

    with machine.builtin_rates():
        plan = dither.clipped_sum(table, loss_fn, strategy=strategy).plan
        gradients = Gradients([Recording(table, loss_fn)], strategy, None)
    ways = {use.strategy for use in plan.uses}
    assert ways == {gradients.collectors["weight"].strategy}
    assert ways == ({"form"} if strategy in ("auto", "hold") else {"cross"})
    formed = 4 * 4 * 500 * 16
    assert sum(use.held_bytes for use in plan.uses) == (formed if ways == {"form"} else 0)
    if strategy == "auto":  # held once, and so it fits
        bound = dither.clipped_sum(table, loss_fn, memory_budget=formed)
        assert {use.strategy for use in bound.plan.uses} == {"form"}
        less = dither.clipped_sum(table, loss_fn, memory_budget=formed - 1)
        assert {use.strategy for use in less.plan.uses} == {"cross"}


def test_more_rows_turn_from_ghost_to_hold():
    model = nn.Linear(256, 256)

    def plan(rows):
        x = torch.randn(2, rows, 256)
        return strategies(dither.clipped_sum(model, lambda: model(x).square().flatten(1).mean(1)).plan)["weight"]

    with machine.builtin_rates():
        assert plan(1) == plan(4) == "ghost"
        assert plan(1024) == "hold"


def test_predictions_follow_the_rates():
    slow = machine.Rates(gemm=1e9, batched=1e9, small=1e9, memory=1e9)
    cost = Cost(hold=1e9, ghost=2e9, held_bytes=1e9, weighted=1e9, row_bytes=0.0)
    assert predicted("hold", cost, slow) == pytest.approx(4.0, rel=1e-3)
    assert predicted("ghost", cost, slow) == pytest.approx(3.0, rel=1e-3)
    assert predicted("tile", cost, slow) == pytest.approx(2.0, rel=1e-3)


def test_rates_are_measured_once_and_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(machine, "_known", {})
    device = torch.device("cpu")
    assert machine.rates_of(device, work=1.0) == machine.BUILTIN and not list(tmp_path.iterdir())
    measured = machine.rates_of(device)
    assert min(measured.gemm, measured.batched, measured.small, measured.memory) > 1e8
    (kept,) = json.loads((tmp_path / "dither" / "rates.json").read_text()).values()
    assert machine.Rates(**kept) == measured
    monkeypatch.setattr(machine, "_known", {})
    assert machine.rates_of(device) == measured  # read, not measured again
    with machine.builtin_rates():
        assert machine.rates_of(device) == machine.BUILTIN
    monkeypatch.setattr(machine, "_known", {})
    (tmp_path / "dither" / "rates.json").write_text("{broken")
    assert machine.rates_of(device).gemm > 1e8


def test_a_plan_is_made_once_for_the_same_operations(monkeypatch):
    from dither.clipping import gradients

    made = []
    original = gradients.make_plan
    monkeypatch.setattr(gradients, "make_plan", lambda *given: made.append(given) or original(*given))
    model, x = nn.Linear(5, 3), torch.randn(4, 5)
    of_another_model = [dither.constant(torch.randn(2)) for _ in range(12)]
    for _ in range(12):
        dither.clipped_sum(model, lambda: model(x).square().sum(1))
        of_another_model.pop()
    assert len(made) == 1
    dither.clipped_sum(model, lambda: model(x).square().sum(1), strategy="hold")
    assert len(made) == 2
