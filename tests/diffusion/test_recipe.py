"""The demo's recipe builds what it says."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace

import pytest
import torch

from dither.data import digits
from dither.diffusion import Recipe, build_ema, build_loss, build_model, build_optimizer, build_process, sample
from dither.errors import ConfigurationError


def test_one_step_end_to_end():
    recipe = replace(Recipe(), multiplicity=2, steps=4)
    model, loss = build_model(recipe, 8, 1, 10), build_loss(recipe, 10)
    optimizer, schedule = build_optimizer(recipe, model)
    average = build_ema(recipe, model)
    train, _ = digits()
    loss(model, train[:6]).mean().backward()
    optimizer.step()
    schedule.step()
    average.update_parameters(model)
    drawn = sample(average.module, [0, 9], process=build_process(recipe), steps=2, seed=0)
    assert drawn.shape == (2, 1, 8, 8) and loss.rows_per_example == 2


@pytest.mark.parametrize(("name", "half"), [("constant", 1.0), ("linear", 0.5), ("cosine", 0.5)])
def test_schedules(name, half):
    recipe = replace(Recipe(), lr_schedule=name, steps=10, learning_rate=1.0)
    _, schedule = build_optimizer(recipe, torch.nn.Linear(1, 1))
    factor = schedule.lr_lambdas[0]
    assert factor(0) == 1 and factor(5) == pytest.approx(half)
    assert factor(10) == (1 if name == "constant" else pytest.approx(0, abs=1e-9))


def test_frozen_and_named_errors():
    with pytest.raises(FrozenInstanceError):
        Recipe().steps = 3
    with pytest.raises(ConfigurationError):
        build_optimizer(replace(Recipe(), lr_schedule="step"), torch.nn.Linear(1, 1))
