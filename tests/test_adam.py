"""Adam with the noise taken off its second moments."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import dither
from dither.adam import AdamBC
from dither.errors import ConfigurationError


def test_without_noise_it_is_torchs_adam():
    models = [nn.Linear(4, 3), nn.Linear(4, 3)]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [AdamBC(models[0].parameters(), 1e-2), torch.optim.Adam(models[1].parameters(), 1e-2)]
    for _ in range(20):
        x = torch.randn(8, 4)
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(models[0].state_dict(), models[1].state_dict())


def test_a_schedule_may_begin_at_zero():
    weight = nn.Parameter(torch.ones(3))
    optimizer = AdamBC([weight], lr=1.0, noise_std=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 2)
    moved = []
    for _ in range(2):
        before, weight.grad = weight.detach().clone(), torch.ones(3)
        optimizer.step()
        schedule.step()
        moved.append(float((weight.detach() - before).abs().max()))
    assert moved[0] == 0.0 < moved[1]


def test_the_noises_variance_is_taken_off():
    """Gradients a in half of the coordinates and 0 in the others, under noise of deviation 1."""
    weight = nn.Parameter(torch.zeros(2000))
    signal = torch.cat([torch.full((1000,), 3.0), torch.zeros(1000)])
    optimizer = AdamBC([weight], lr=1.0, betas=(0.9, 0.999), floor=0.1, noise_std=1.0)
    for _ in range(3000):
        weight.grad = signal + torch.randn(2000)
        optimizer.step()
    state = optimizer.state[weight]
    corrected = state["exp_avg_sq"] / (1 - 0.999**3000) - 1.0
    assert corrected[:1000].mean() == pytest.approx(9.0, rel=0.02)
    assert corrected[1000:].mean() == pytest.approx(0.0, abs=0.02)
    moved = weight.detach()
    weight.grad = signal + torch.randn(2000)
    before = moved.clone()
    optimizer.step()
    expected = -state["exp_avg"] / corrected.clamp(min=0.1).sqrt()
    torch.testing.assert_close(weight.detach() - before, expected, rtol=0.05, atol=0.05)


def test_private_training_tells_it_the_noise():
    model = nn.Linear(3, 2)
    data = TensorDataset(torch.randn(40, 3))
    training = dither.PrivateTraining(
        model,
        AdamBC(model.parameters()),
        data,
        lambda model, batch: model(batch[0]).square().sum(1),
        expected_batch_size=10,
        steps=2,
        max_grad_norm=0.5,
        noise_multiplier=2.0,
    )
    assert training.optimizer.param_groups[0]["noise_std"] == pytest.approx(2.0 * 0.5 / 10)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    training.step()
    assert all(not torch.equal(before[name], p) for name, p in model.named_parameters())


@pytest.mark.parametrize("arguments", [{"lr": 0.0}, {"betas": (0.9, 1.0)}, {"floor": 0.0}, {"noise_std": -1.0}])
def test_bad_arguments_are_refused(arguments):
    with pytest.raises(ConfigurationError):
        AdamBC([nn.Parameter(torch.zeros(2))], **arguments)
