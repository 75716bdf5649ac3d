"""Losses that compare every example's output with every example's target are refused; with constants they are exact."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import dither
import oracle
from differences import each_loss
from dither.errors import CoupledExamplesError

pytestmark = [pytest.mark.usefixtures("double_precision"), pytest.mark.filterwarnings("ignore:Using a target size")]
B = 6


@each_loss
@pytest.mark.parametrize("dtype", [torch.float64, torch.int64])
def test_every_output_against_every_target_is_refused_each_time(loss, dtype):
    model, x, target = nn.Linear(3, 1), torch.randn(B, 3), (9.0 * torch.randn(B)).to(dtype)
    for _ in range(2):
        with pytest.raises(CoupledExamplesError, match="every example's target"):
            dither.clipped_sum(model, lambda: loss(model(x), target.to(x.dtype)).mean(1))


@each_loss
@pytest.mark.parametrize("width, targets", [(1, (B, 1)), (1, (B, B)), (B, (B, B)), (B, (B,)), (B, (B, 1))])
def test_as_many_entries_as_examples_are_exact(loss, width, targets):
    model, x, target = nn.Linear(3, width), torch.randn(B, 3), torch.randn(targets)
    _check(model, lambda: loss(model(x), target).mean(1))


class Levels(nn.Module):
    """Compares one output with as many levels as there are examples."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1)
        self.register_buffer("levels", torch.linspace(-1.0, 1.0, B))


@each_loss
def test_constant_levels_are_exact(loss):
    model, x = Levels(), torch.randn(B, 3)
    _check(model, lambda: loss(model.layer(x), model.levels).mean(1))
    declared = dither.constant(torch.linspace(-1.0, 1.0, B))
    _check(model, lambda: loss(model.layer(x), declared).mean(1))
    _check(model, lambda: loss(model.layer(x), torch.linspace(-1.0, 1.0, B)).mean(1))


def _check(model, losses):
    truth = oracle.clipped_sum(oracle.per_example_gradients(model, losses), 0.3)
    assert oracle.relative_error(dither.clipped_sum(model, losses, max_grad_norm=0.3).gradients, truth) <= 1e-12
