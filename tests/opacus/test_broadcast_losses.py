"""Losses of outputs and targets whose shapes differ: refused where every example meets every target, else exact."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import oracle
from differences import each_loss
from dither import errors
from dither.opacus import (
    DPLossFastGradientClipping,
    DPOptimizer,
    DPOptimizerFastGradientClipping,
    GradSampleModule,
    GradSampleModuleFastGradientClipping,
)

pytestmark = [pytest.mark.usefixtures("double_precision"), pytest.mark.filterwarnings("ignore:Using a target size")]
B = 6
each_mode = pytest.mark.parametrize("mode", ["hooks", "ghost"])


def per_example(loss, output, target):
    return loss(output, target).flatten(1).mean(1)


def clipped_sum(mode, model, loss, x, target):
    """By name, through the drop-in."""
    sgd = torch.optim.SGD(model.parameters(), lr=0.0)
    settings = {"noise_multiplier": 0.0, "max_grad_norm": 0.3, "expected_batch_size": B}
    if mode == "hooks":
        wrapped, optimizer = GradSampleModule(model), DPOptimizer(sgd, **settings)
        loss(wrapped(x), target).mean().backward()
    else:
        wrapped = GradSampleModuleFastGradientClipping(model, max_grad_norm=0.3)
        optimizer = DPOptimizerFastGradientClipping(sgd, **settings)
        criterion = DPLossFastGradientClipping(wrapped, optimizer, lambda *args: per_example(loss, *args))
        criterion(wrapped(x), target).backward()
    optimizer.step()
    return {name: p.summed_grad for name, p in model.named_parameters()}


@each_mode
@each_loss
@pytest.mark.parametrize(
    ("model", "inputs", "targets"),
    [
        (lambda: nn.Linear(3, 1), (B, 3), (B,)),
        (lambda: nn.Sequential(nn.Linear(3, 1), nn.Flatten(0)), (B, 3), (B, 1)),
        (lambda: nn.Conv2d(2, 1, 1), (B, 2, 4, 4), (B, 4, 4)),
    ],
    ids=["column and row", "row and column", "images without channel"],
)
def test_every_output_against_every_target_is_refused(mode, loss, model, inputs, targets):
    with pytest.raises(errors.CoupledExamplesError, match="every example's target"):
        clipped_sum(mode, model(), loss, torch.randn(inputs), torch.randn(targets))


@each_mode
@each_loss
@pytest.mark.parametrize(
    ("width", "targets"),
    [(1, (B, 1)), (1, (B, B)), (B, (B, B)), (B, (B, 1)), (B, (B,))],
    ids=["columns", "many targets", "squares", "one target", "the same targets"],
)
def test_as_many_entries_as_examples_are_exact(mode, loss, width, targets):
    model, x, target = nn.Linear(3, width), torch.randn(B, 3), torch.randn(targets)
    truth = oracle.per_example_gradients(model, lambda: per_example(loss, model(x), target))
    found = clipped_sum(mode, model, loss, x, target)
    assert oracle.relative_error(found, oracle.clipped_sum(truth, 0.3)) <= 1e-5


def test_a_loss_that_is_vouched_for_is_not_looked_at():
    wrapped = GradSampleModule(nn.Linear(3, 1))
    wrapped.verify_loss = False
    F.mse_loss(wrapped(torch.randn(B, 3)), torch.randn(B)).backward()
