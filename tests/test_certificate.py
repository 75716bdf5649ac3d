"""What the certificate says of the first batch's verification, and that nothing is released when it fails."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

from dither import errors
from dither.accounting import CLASS_GAUSSIANS, CLASS_MEANS, Event
from dither.rules import rule
from dither.rules.rule import Rule, register_rule
from dither.training import PrivateTraining

N = 12


class Slope(Rule):
    """PReLU's single slope, off by a factor."""

    factor = 1.1

    def per_example_gradient(self, use, grad_output, out=None):
        x, g = use.examples.rows(use.operand("input")), use.examples.rows(grad_output)
        return self.factor * (g * x.clamp(max=0)).sum((1, 2)).unsqueeze(1)


@pytest.fixture
def inexact():
    """An operation whose rule is off until its factor is set to 1."""
    before, slope = dict(rule._TABLE), Slope()
    register_rule(F.prelu, ("input", "weight"), {"weight": slope})
    yield slope
    rule._TABLE.clear()
    rule._TABLE.update(before)


def dataset():
    return TensorDataset(torch.randn(N, 4, generator=torch.Generator().manual_seed(0)))


def loss_fn(net, batch):
    return net(batch[0]).square().sum(1)


def make(**options):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.PReLU(), nn.Linear(6, 3))
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    settings = {"expected_batch_size": N, "steps": 4, "noise_multiplier": 1.0} | options
    return PrivateTraining(net, optimizer, dataset(), loss_fn, **settings)


def resume(path):
    net = nn.Sequential(nn.Linear(4, 6), nn.PReLU(), nn.Linear(6, 3))
    return PrivateTraining.resume(path, net, torch.optim.SGD(net.parameters(), lr=1.0), dataset(), loss_fn)


def said(training) -> dict:
    return json.loads(json.dumps(training.certificate(), allow_nan=False))["verification"]


def test_the_mechanism_names_every_release_of_the_ledger():
    steps = make().certificate()["mechanism"]
    assert steps.startswith("DP-SGD: ") and "before" not in steps
    means, gaussians = Event(1.0, 9.0, 1, CLASS_MEANS), Event(1.0, 9.0, 3, CLASS_GAUSSIANS)
    for prior, named in (
        ([means], "class means"),
        ([means, Event(0.5, 9.0, 2, CLASS_MEANS), gaussians], "class means and class Gaussians"),
    ):
        said = make(prior=prior).certificate()
        assert said["mechanism"] == f"{steps}; before it, {named} released with Gaussian noise"
        assert all(event["release"] in said["mechanism"] for event in said["ledger"])


def test_exact_not_run_and_turned_off_are_told_apart():
    training = make()
    assert said(training) == {"status": "not run", "exact": None}
    training.step()
    found = said(training)
    assert found["status"] == "exact" and found["exact"] is True
    assert found == {"status": "exact", "exact": True, "first_step": 0, "tolerance": 1e-4}
    kept = training.verification  # not for publication
    assert kept["examples"] == 4 and kept["max_relative_error"] <= 1e-4
    assert kept["parameters"] == 5 and kept["parameters_without_gradient"] == 0
    off = make(verify_first_batch=False)
    off.step()
    assert said(off) == {"status": "turned off", "exact": None}


def test_a_batch_without_examples_is_not_called_verified():
    training = make()
    training.sampler.draw = lambda step: np.arange(0 if step == 0 else 3)
    training.step()
    assert said(training)["status"] == "not run"
    training.step()
    assert said(training)["status"] == "exact" and said(training)["first_step"] == 1
    assert training.verification["examples"] == 3


def test_nothing_is_released_when_it_fails_and_the_certificate_says_so(inexact):
    training = make(ema_decay=0.9)
    before = [p.detach().clone() for p in training.model.parameters()]
    for _ in range(2):  # again at the next attempt
        with pytest.raises(errors.CaptureError, match=r"parameter 1\.weight"):
            training.step()
    assert training.index == 0 and training.ledger.steps == 0
    assert all(torch.equal(a, b) for a, b in zip(before, training.model.parameters(), strict=True))
    assert all(p.grad is None for p in training.model.parameters())
    assert not training.optimizer.state
    assert all(torch.equal(training.ema[name], p) for name, p in training.parameters.items())
    found = said(training)
    assert found["status"] == "not exact" and found["exact"] is False
    assert training.verification["max_relative_error"] > 0.01
    assert training.certificate()["private"] is True  # nothing was released


def test_steps_after_a_failed_verification_are_not_private(inexact, tmp_path):
    training = make()
    with pytest.raises(errors.CaptureError):
        training.step()
    training.first_batches.wanted = False
    training.step()
    certificate = training.certificate()
    assert certificate["private"] is False and "not exact" in certificate["reasons"][0]
    training.save(tmp_path)
    resumed = resume(tmp_path)
    assert resumed.certificate()["private"] is False


def test_the_run_s_own_strategy_is_what_is_verified(inexact):
    inexact.factor = 1.0
    inexact.holds_cheaply = False
    inexact.tile_squared_norm = lambda use, grad: 4 * Rule.squared_norm(inexact, use, grad)
    make(strategy="hold").step()
    with pytest.raises(errors.CaptureError, match="strategy tile"):
        make(strategy="tile").step()


def test_a_resumed_run_keeps_the_result_and_verifies_again(tmp_path, inexact):
    inexact.factor = 1.0
    training = make()
    training.step()
    training.save(tmp_path)
    resumed = resume(tmp_path)
    assert said(resumed) == said(training)
    inexact.factor = 1.1  # the code changed between the sessions
    with pytest.raises(errors.CaptureError):
        resumed.step()
    assert resumed.index == 1
    inexact.factor = 1.0
    resumed.step()
    assert said(resumed)["status"] == "exact" and said(resumed)["first_step"] == 1


class Gated(nn.Module):
    """As adaLN-zero: at first no gradient passes the gate."""

    def __init__(self):
        super().__init__()
        self.inner, self.gate = nn.Sequential(nn.Linear(4, 6), nn.PReLU()), nn.Linear(6, 3)
        nn.init.zeros_(self.gate.weight)

    def forward(self, x):
        return self.gate(self.inner(x)) + x[:, :3]


class Closed(nn.Linear):
    """A parameter whose gradient is zero for ever."""

    def __init__(self):
        super().__init__(4, 3)
        self.closed = nn.Parameter(torch.ones(3))

    def forward(self, x):
        return super().forward(x) + 0.0 * self.closed


def gated(net=None):
    torch.manual_seed(0)
    net = Gated() if net is None else net
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    return PrivateTraining(net, optimizer, dataset(), loss_fn, expected_batch_size=N, steps=4, noise_multiplier=1.0)


def test_what_a_closed_gate_hid_is_verified_once_it_is_open(inexact):
    training = gated()
    training.step()
    assert said(training)["status"] == "exact" and training.verification["parameters_without_gradient"] == 3
    with pytest.raises(errors.CaptureError, match=r"parameter inner\.1\.weight"):
        training.step()
    assert training.index == 1
    assert training.certificate()["private"] is True  # in the step that was taken, this gradient was zero


def test_verification_ends_when_every_parameter_was_reached(inexact):
    inexact.factor = 1.0
    training = gated()
    training.step()
    training.step()
    assert training.verification["parameters_without_gradient"] == 0 and said(training)["first_step"] == 1
    inexact.factor = 1.1
    training.step()
    assert said(training)["first_step"] == 1


def test_verification_ends_after_three_batches():
    training = gated(Closed())
    for _ in training:
        pass
    assert training.verification["parameters_without_gradient"] == 1 and said(training)["first_step"] == 2
