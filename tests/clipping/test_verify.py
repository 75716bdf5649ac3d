"""`verify`: what it says is true, in every precision, and it does not say exact of what is not."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dither
from dither import errors
from dither.clipping.verify import RandomState
from dither.rules import rule
from dither.rules.rule import Rule, register_rule

STRATEGIES = ("auto", "hold", "ghost", "tile", "two_pass")


@pytest.fixture
def rules():
    """Rules registered in the test are forgotten after it."""
    before = dict(rule._TABLE)
    yield
    rule._TABLE.clear()
    rule._TABLE.update(before)


class Slope(Rule):
    """PReLU's single slope; `factor` 1 is right."""

    factor = 1.0

    def per_example_gradient(self, use, grad_output, out=None):
        x, g = use.examples.rows(use.operand("input")), use.examples.rows(grad_output)
        return self.factor * (g * x.clamp(max=0)).sum((1, 2)).unsqueeze(1)


class SlopeOfTwo(Slope):
    """Right except in the weighted sum, and in it only where asked."""

    wrong = True

    def add_weighted_sum(self, use, grad_output, weights, into):
        super().add_weighted_sum(use, grad_output, weights * (2.0 if self.wrong else 1.0), into)


class Everything(nn.Module):
    """Used once, twice, through a computed tensor, behind zero, not at all; with rows."""

    def __init__(self):
        super().__init__()
        self.first, self.twice, self.spare = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(2, 2)
        self.square, self.closed = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4))

    def forward(self, x):
        h = self.twice(self.twice(self.first(x)).tanh())
        return F.linear(h.flatten(0, 1), self.square.t() @ self.square) + 0.0 * self.closed


def losses_of(model, x):
    return model(x).view(len(x), -1).square().sum(1)


def test_the_report_tells_each_parameter_its_uses_and_where_the_examples_lie(double_precision):
    model, x = Everything(), torch.randn(3, 5, 3)
    report = dither.verify(model, lambda: losses_of(model, x))
    assert report.exact and report.independent and report.repeats and report.max_relative_error < 1e-12
    assert report.examples == 3 and report.tolerance == 1e-8
    assert tuple(report.strategies) == STRATEGIES
    assert report.unused == ("spare.weight", "spare.bias") and report.zero == ("closed",)
    assert report.shapes["first.weight"] == (4, 3)
    (once,) = report.uses_of("first.weight")
    assert (once.operation, once.layout) == ("linear", "axis 0, 1 row an example")
    plan = dither.clipped_sum(model, lambda: losses_of(model, x)).plan
    assert once.strategy in [use.strategy for use in plan.uses if use.parameter == "first.weight"]
    assert len(report.uses_of("twice.weight")) == 2
    (computed,) = report.uses_of("square")
    assert computed.rows_per_example == 5 and computed.layout == "axis 0, 5 rows in a run an example"
    text = str(report)
    assert text.startswith("exact: every example's gradient is its own; safe to train privately\n")
    assert "tolerance 1e-08" in text and "no example influences another" in text
    (row,) = [line for line in text.splitlines() if line.startswith("spare.weight")]
    assert row.endswith("unused in this batch")
    (row,) = [line for line in text.splitlines() if line.startswith("closed")]
    assert " zero " in row
    assert any("1 of 8 parameters have a zero gradient" in remark for remark in report.remarks)


@pytest.mark.parametrize(
    ("losses", "layout"),
    [
        (lambda net, x: net(x.transpose(0, 1)).sum((0, 2)), "axis 1, 1 row an example"),
        (lambda net, x: net(x.transpose(0, 1).flatten(0, 1)).view(5, 3, 2).sum((0, 2)), "5 rows an example, 3 apart"),
        (
            lambda net, x: net(x.reshape(3, 5, 4).flatten(0, 1)).view(3, 5, 2).sum((1, 2)),
            "5 rows in a run an example",
        ),
        (lambda net, x: net(x[:1].expand(2, 5, 4)).sum((1, 2))[:1], "the only example"),
    ],
    ids=["time first", "apart", "in a run", "one"],
)
def test_layouts_in_words(losses, layout, double_precision):
    net, x = nn.Linear(4, 2), torch.randn(3, 5, 4)
    if layout == "the only example":
        report = dither.verify(net, lambda: net(x[:1]).sum((1, 2)))
        assert report.exact and not report.independent and report.verdict.startswith("exact, but on one example")
    else:
        report = dither.verify(net, lambda: losses(net, x))
        assert report.exact and report.independent
    assert all(use.layout.endswith(layout) for use in report.uses)


def test_rows_in_no_regular_order_in_words(double_precision):
    net, x, order = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), torch.randn(3, 4), torch.tensor([2, 0, 0, 1, 2, 0])

    def loss_fn():  # as a mixture of experts gathers tokens
        return torch.zeros(3).index_add(0, order, net[1](net[0](x)[order]).square().sum(1))

    report = dither.verify(net, loss_fn)
    assert report.exact and report.independent
    (gathered,) = report.uses_of("1.weight")
    assert gathered.layout == "axis 0, up to 3 rows an example, in no regular order"
    assert gathered.rows_per_example == 3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_every_precision_has_its_tolerance(dtype):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype), torch.randn(5, 4).to(dtype)
    report = dither.verify(model, lambda: model(x).square().sum(1))
    assert report.tolerance == {torch.float64: 1e-8, torch.float32: 1e-4}.get(dtype, 5e-2)
    assert report.exact, report


def test_the_coarsest_parameter_sets_the_tolerance():
    model = nn.ModuleList([nn.Linear(4, 4).double(), nn.Linear(4, 3).bfloat16()])
    x = torch.randn(5, 4, dtype=torch.float64)
    report = dither.verify(model, lambda: model[1](model[0](x).bfloat16()).float().square().sum(1))
    assert report.tolerance == 5e-2 and report.exact, report


class Complex(nn.Module):
    def __init__(self):
        super().__init__()
        self.filter = nn.Parameter(torch.randn(4, dtype=torch.complex64))

    def forward(self, x):
        return torch.fft.irfft(torch.mul(torch.fft.rfft(x), self.filter))


class Filtered(Rule):
    """A complex product whose gradient's imaginary part is scaled; `imaginary` 1 is right."""

    imaginary = 1.0

    def per_example_gradient(self, use, grad_output, out=None):
        g = use.examples.split(grad_output * use.operand("input").conj()).flatten(1)
        return torch.complex(g.real, self.imaginary * g.imag)


def test_complex_parameters_are_compared_with_their_imaginary_part(rules):
    torch.manual_seed(0)
    model, x = Complex(), torch.randn(4, 6)
    halved = Filtered()
    register_rule(torch.mul, ("input", "other"), {"other": halved})
    report = dither.verify(model, lambda: model(x).square().sum(1))
    assert report.exact and report.tolerance == 1e-4 and report.max_relative_error < 1e-6
    halved.imaginary = 0.5
    assert not dither.verify(model, lambda: model(x).square().sum(1)).exact


def test_no_example_is_refused_by_name():
    model = nn.Linear(3, 2)
    with pytest.raises(errors.ConfigurationError, match="no example nothing can be verified"):
        dither.verify(model, lambda: model(torch.randn(0, 3)).sum(1))


def test_an_unknown_strategy_is_refused():
    model = nn.Linear(3, 2)
    with pytest.raises(errors.UnknownStrategyError, match="fast"):
        dither.verify(model, lambda: model(torch.randn(2, 3)).sum(1), strategies=["fast"])


# --- not exact ------------------------------------------------------------------------------------


def prelu():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(5, 6), nn.PReLU(), nn.Linear(6, 2)).double(), torch.randn(4, 3, 5).double()
    return model, lambda: model(x).square().sum((1, 2))


@pytest.mark.parametrize("off", [1e-6, 1e-3])
def test_a_rule_that_is_off_is_not_exact(off, rules):
    model, loss_fn = prelu()
    slope = Slope()
    register_rule(F.prelu, ("input", "weight"), {"weight": slope})
    assert dither.verify(model, loss_fn).exact
    slope.factor = 1 + off
    report = dither.verify(model, loss_fn)
    assert not report.exact and report.errors["1.weight"] == pytest.approx(off)
    assert report.verdict.startswith("NOT exact: do not train privately") and "parameter 1.weight" in report.verdict
    assert "0.weight" not in report.verdict


def test_a_sum_that_is_off_is_not_exact_though_the_gradients_are(rules):
    model, loss_fn = prelu()
    register_rule(F.prelu, ("input", "weight"), {"weight": SlopeOfTwo()})
    model[1].weight.data.fill_(0.3)
    SlopeOfTwo.holds_cheaply = False
    try:
        SlopeOfTwo.wrong = True
        report = dither.verify(model, loss_fn, ("hold", "ghost", "tile"))
        assert not report.exact
        assert max(report.errors.values()) < 1e-12 and report.strategies["hold"] < 1e-12
        assert report.strategies["ghost"] > 0.1 and report.max_relative_error > 0.1
        assert "strategy ghost" in report.verdict and "strategy hold" not in report.verdict
        SlopeOfTwo.wrong = False
        assert dither.verify(model, loss_fn).exact
    finally:
        SlopeOfTwo.holds_cheaply = True


def test_a_gradient_that_is_not_a_number_is_not_exact(rules):
    model, loss_fn = prelu()
    slope = Slope()
    slope.factor = float("nan")
    register_rule(F.prelu, ("input", "weight"), {"weight": slope})
    report = dither.verify(model, loss_fn)
    assert not report.exact and report.max_relative_error == float("inf")
    report = dither.verify(model, loss_fn, strategies=[])
    assert not report.exact and report.errors["1.weight"] == report.max_relative_error == float("inf")


def test_examples_that_are_not_finite_are_left_out_and_counted(double_precision):
    model, x = nn.Linear(3, 2), torch.randn(4, 3)
    scale = torch.tensor([1.0, 1e300, 1.0, 1.0])
    report = dither.verify(model, lambda: model(x).square().sum(1) * scale)
    assert report.exact and report.not_finite == 1 and report.examples == 3
    assert any("not finite" in remark for remark in report.remarks)
    x[1] = float("nan")
    with pytest.raises(errors.ConfigurationError, match=r"examples \[1\] are not finite"):
        dither.verify(model, lambda: model(x).square().sum(1))
    x[:] = float("nan")
    report = dither.verify(model, lambda: model(x).square().sum(1))
    assert not report.exact and "nothing could be compared" in report.verdict


def test_a_gradient_that_cancels_to_rounding_is_not_called_wrong():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(3, 4, 3), nn.InstanceNorm1d(4), nn.Conv1d(4, 2, 1))
    x = torch.randn(3, 3, 9)

    def loss_fn():
        return model(x).flatten(1).sin().mean(1)

    ours = dither.per_example_gradients(model, loss_fn)["0.bias"]
    truth = torch.stack([torch.autograd.grad(loss, model[0].bias, retain_graph=True)[0] for loss in loss_fn()])
    assert (ours - truth).norm() > 0 and truth.norm() < 1e-6  # noise on both sides
    report = dither.verify(model, loss_fn)
    assert report.exact, report
    assert report.errors["0.bias"] < 1e-6


# --- randomness -----------------------------------------------------------------------------------


def test_randomness_of_torch_python_and_numpy_is_replayed_and_left_as_it_was(double_precision):
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2)), torch.randn(4, 3)

    def loss_fn():
        keep = 1.0 if random.random() < 0.5 else 3.0  # drop path
        scale = torch.tensor(np.random.rand(4))
        return model(x).square().sum(1) * scale * keep

    before = torch.get_rng_state(), random.getstate(), np.random.get_state()
    for _ in range(5):
        report = dither.verify(model, loss_fn)
        assert report.exact and report.repeats
        random.random()
    random.setstate(before[1])
    assert torch.equal(before[0], torch.get_rng_state())
    assert all(np.array_equal(a, b) for a, b in zip(before[2], np.random.get_state(), strict=True))


@pytest.mark.parametrize("own", ["generator", "numpy", "counter"])
def test_randomness_that_cannot_be_replayed_is_said(own, double_precision):
    model, x = nn.Linear(3, 2), torch.randn(4, 3)
    generator, numbers, count = torch.Generator().manual_seed(0), np.random.default_rng(0), iter(range(1, 99))
    draw = {
        "generator": lambda: torch.rand(4, generator=generator),
        "numpy": lambda: torch.tensor(numbers.random(4)),
        "counter": lambda: torch.full((4,), float(next(count))),
    }[own]
    report = dither.verify(model, lambda: model(x).square().sum(1) * draw())
    assert not report.exact and not report.repeats
    assert "draws randomness of its own" in report.verdict
    report = dither.verify(model, lambda: model(x).square().sum(1) + draw())
    assert not report.exact and not report.repeats  # though the gradients are the same


def test_the_random_state_is_restored_after_a_refusal():
    model, x = nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.5), nn.BatchNorm1d(2)), torch.randn(4, 3)
    before = torch.get_rng_state()
    with pytest.raises(errors.CoupledExamplesError):
        dither.verify(model, lambda: model(x).sum(1))
    assert torch.equal(before, torch.get_rng_state())


def test_random_state_restores_every_source():
    state = RandomState([torch.device("cpu")])
    first = torch.rand(3), random.random(), np.random.rand()
    state.restore()
    second = torch.rand(3), random.random(), np.random.rand()
    assert torch.equal(first[0], second[0]) and first[1:] == second[1:]


def test_a_changing_number_of_losses_is_refused():
    model, x, sizes = nn.Linear(3, 2), torch.randn(4, 3), iter([4, 4, 3])
    with pytest.raises(errors.LossShapeError, match="4 losses, then 3"):
        dither.verify(model, lambda: model(x[: next(sizes)]).sum(1))
