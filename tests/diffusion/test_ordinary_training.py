"""Training without noise: it learns, and goes on where it was left."""

from __future__ import annotations

import copy

import pytest
import torch

from dither.data import read_images
from dither.diffusion import DiffusionLoss, Process, dit
from dither.diffusion.ordinary_training import OrdinaryTraining
from dither.errors import ConfigurationError


def prepared(model, **settings):
    loss = DiffusionLoss(Process(prediction="edm"), multiplicity=2)
    trained = [p for p in model.parameters() if p.requires_grad]
    return OrdinaryTraining(model, trained, read_images(), loss, **{"steps": 20, "learning_rate": 1e-2, **settings})


def test_the_loss_falls():
    torch.manual_seed(0)
    training = prepared(dit("DiT-tiny"))
    losses = [training.step() for _ in range(20)]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


def test_taken_up_again_it_is_the_same():
    torch.manual_seed(0)
    model = dit("DiT-tiny", class_dropout_prob=0.1)
    training = prepared(model, batch_size=8)
    for _ in range(3):
        training.step()
    state, other = copy.deepcopy(training.state_dict()), dit("DiT-tiny")
    again = prepared(other, batch_size=8)
    again.load_state_dict(state)
    for each in (training, again):
        torch.manual_seed(1)
        each.step()
    assert again.index == 4
    assert all(torch.equal(first, second) for first, second in zip(model.parameters(), other.parameters(), strict=True))


def test_frozen_parameters_are_trained_and_frozen_again():
    model = dit("DiT-tiny")
    bias = model.final_layer.linear.bias
    bias.requires_grad_(False)
    OrdinaryTraining(model, [bias], read_images(), DiffusionLoss(Process()), steps=1).step()
    assert bias.any() and not bias.requires_grad and bias.grad is None


@pytest.mark.parametrize("name", ["steps", "learning_rate", "batch_size"])
def test_settings_that_cannot_work(name):
    with pytest.raises(ConfigurationError, match=name):
        prepared(dit("DiT-tiny"), **{name: 0})
