"""The planner: the cheapest way by the machine's rates, a budget that is kept or refused, a plan that is kept."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import dither
import oracle
from dither import errors
from dither.clipping import machine
from dither.clipping.plan import predicted
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


def test_uses_that_cancel_are_multiplied_again_in_float64():
    layer = nn.Linear(3, 3, bias=False)
    x = torch.randn(4, 6, 3)

    def loss_fn():  # the two gradients are all but opposite
        return (layer(x) - layer(x * (1 + 1e-4))).sum((1, 2)) * 1e3

    crossed = dither.per_example_norms(layer, loss_fn)
    exact = dither.clipped_sum(
        layer.double(), lambda: (layer(x.double()) - layer((x * (1 + 1e-4)).double())).sum((1, 2)) * 1e3
    )
    assert torch.allclose(crossed.double(), exact.norms, rtol=1e-5)


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


def test_a_budget_that_cannot_be_kept_is_refused_with_the_numbers():
    weight = nn.Parameter(torch.randn(30, 30))
    holder = nn.ParameterList([weight])
    x = torch.randn(4, 5, 30)

    def loss_fn():
        return (x @ (weight @ weight.T)).square().flatten(1).mean(1)

    with pytest.raises(errors.MemoryBudgetError, match=r"100 bytes.*14,400"):
        dither.clipped_sum(holder, loss_fn, memory_budget=100)
    dither.clipped_sum(holder, loss_fn, memory_budget=20_000)


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
    for _ in range(12):
        dither.clipped_sum(model, lambda: model(x).square().sum(1))
    assert len(made) == 1
    dither.clipped_sum(model, lambda: model(x).square().sum(1), strategy="hold")
    assert len(made) == 2
