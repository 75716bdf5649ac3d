"""trust.md's second list, where the public functions can show it; `test_trust_index.py` says where the others are."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import dither
from clipping.test_exactness import STRATEGIES, assert_exact, loss_of, removal_moves
from dither import errors
from dither.clipping.functions import clipping_function

pytestmark = pytest.mark.usefixtures("double_precision")
each_strategy = pytest.mark.parametrize("strategy", STRATEGIES)


def network():
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.LayerNorm(4), nn.Linear(4, 2))


@each_strategy
def test_the_clip_bound_is_obeyed(strategy):
    """Each example alone: its own gradient below the bound, exactly the bound above it."""
    model, x = network(), torch.randn(6, 5, 3)
    norms = dither.per_example_norms(model, lambda: loss_of(model(x)))
    for bound in (float(norms.min()) / 3, float(norms.median()), float(norms.max()) * 3):
        for i in range(6):
            one = dither.clipped_sum(
                model, lambda i=i: loss_of(model(x[i : i + 1])), max_grad_norm=bound, strategy=strategy
            )
            length = sum(g.square().sum() for g in one.gradients.values()).sqrt()
            assert float(length) == pytest.approx(min(bound, float(norms[i])), rel=1e-10)


@each_strategy
def test_each_example_is_clipped_not_their_sum(strategy):
    """Equal examples: the sum is as long as their number times the bound, however the batch is cut."""
    model, x, bound = network(), torch.randn(1, 5, 3).repeat(6, 1, 1), 0.01
    for parts in ([x], [x[:1], x[1:]], [x[:3], x[3:]]):
        sums = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
        for part in parts:
            dither.clipped_sum(
                model, lambda p=part: loss_of(model(p)), max_grad_norm=bound, strategy=strategy, into=sums
            )
        length = float(sum(g.square().sum() for g in sums.values()).sqrt())
        assert length == pytest.approx(6 * bound, rel=1e-10)


@each_strategy
@pytest.mark.parametrize("clipping", ["flat", "automatic", "normalised", "per_layer", "per_group"])
def test_every_clipping_function_keeps_the_sensitivity_it_states(clipping, strategy):
    """Over all parameters together, whatever the function bounds; one that does not exist is refused."""
    model, x, bound = network(), torch.randn(6, 5, 3) * torch.tensor([1e-3, 1, 1, 10, 1, 1]).view(6, 1, 1), 0.5

    def total(rows):
        return dither.clipped_sum(
            model, lambda: loss_of(model(x[rows])), max_grad_norm=bound, clipping=clipping, strategy=strategy
        )

    try:
        clipping_function(clipping, bound)
    except errors.UnknownClippingError:
        with pytest.raises(errors.UnknownClippingError):
            total([0, 1])
        return
    whole = total(list(range(6)))
    for i in range(6):
        less = total([j for j in range(6) if j != i])
        moved = sum((whole.gradients[n] - less.gradients[n]).square().sum() for n in whole.gradients).sqrt()
        assert float(moved) <= whole.sensitivity * (1 + 1e-9)


@each_strategy
@pytest.mark.parametrize("consecutive", [True, False])
def test_augmentations_of_one_example_are_one_example(consecutive, strategy):
    """Four noisy copies of each image in one loss: removing the image moves the sum by the bound once."""
    model, x, copies, bound = network(), torch.randn(5, 3), 4, 0.1
    noise = torch.randn(5, copies, 3)

    def loss(rows):
        seen = x[rows].unsqueeze(1) + noise[rows]
        if consecutive:
            return loss_of(model(seen.flatten(0, 1))).view(-1, copies).mean(1)
        return loss_of(model(seen.transpose(0, 1).flatten(0, 1))).view(copies, -1).mean(0)

    assert_exact(model, lambda: loss(list(range(5))))
    assert removal_moves(model, loss, 5, 2, bound, strategy) == pytest.approx(1.0, rel=1e-9)


def test_rate_and_divisor_come_from_public_constants():
    """Whatever batches come: the ledger's rate, the number of steps and the divisor stay as planned."""
    for sizes in ([0, 1, 24], [3, 3, 3]):
        torch.manual_seed(0)
        model = nn.Linear(4, 3)
        data = TensorDataset(torch.randn(24, 4), torch.randn(24, 3))
        training = dither.PrivateTraining(
            model,
            torch.optim.SGD(model.parameters(), lr=1.0),
            data,
            lambda net, batch: (net(batch[0]) - batch[1]).square().sum(1),
            expected_batch_size=6,
            steps=3,
            noise_multiplier=1e-6,
            max_grad_norm=0.5,
        )
        drawn = iter(sizes)
        training.sampler.draw = lambda step, drawn=drawn: np.arange(next(drawn))
        for size in sizes:
            x, y = (t[:size] for t in data.tensors)
            before = model.weight.detach().clone()
            truth = dither.clipped_sum(model, lambda m=model, x=x, y=y: (m(x) - y).square().sum(1), max_grad_norm=0.5)
            training.step()
            expected = before - truth.gradients["weight"] / 6
            torch.testing.assert_close(model.weight.detach(), expected, rtol=0, atol=1e-5)
        (event,) = training.ledger.events
        assert (event.sampling_probability, event.noise_multiplier, event.count) == (0.25, 1e-6, 3)
        assert training.certificate()["neighbouring_relation"] == "add or remove one example"


def test_a_user_seed_repeats_neither_noise_nor_batches_in_another_run():
    """`torch.manual_seed` before every run, as scripts do: the noise and the batches are still fresh."""
    moves, batches = [], []
    for _ in range(2):
        torch.manual_seed(0)
        np.random.seed(0)
        model = nn.Linear(4, 3)
        data = TensorDataset(torch.randn(40, 4))
        training = dither.PrivateTraining(
            model,
            torch.optim.SGD(model.parameters(), lr=1.0),
            data,
            lambda net, batch: net(batch[0]).sum(1) * 0,
            expected_batch_size=20,
            steps=2,
            noise_multiplier=1.0,
            verify_first_batch=False,
        )
        draw, drawn = training.sampler.draw, []

        def remember(step, draw=draw, drawn=drawn):
            drawn.append(tuple(draw(step).tolist()))
            return np.array(drawn[-1], dtype=np.int64)

        training.sampler.draw = remember
        before = model.weight.detach().clone()
        for _ in training:
            moves.append(model.weight.detach() - before)
            before = model.weight.detach().clone()
        batches += drawn
        assert training.certificate()["private"] is True
    assert len(set(batches)) == 4
    assert all(not torch.equal(a, b) for i, a in enumerate(moves) for b in moves[:i])
