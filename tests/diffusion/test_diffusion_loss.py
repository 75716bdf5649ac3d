"""The per-example loss: multiplicity, one label coin per image, the variational term."""

from __future__ import annotations

import pytest
import torch
from denoisers import perturbed

import dither
from dither.diffusion import DiffusionLoss, Draws, Process, dit
from dither.diffusion.variational import variational_bound
from dither.errors import ConfigurationError, LabelError


def batch(count=4):
    generator = torch.Generator().manual_seed(2)
    return torch.rand(count, 1, 8, 8, generator=generator) * 2 - 1, torch.arange(count) % 10


def test_average_of_single_losses_with_the_same_draws():
    model, (images, labels) = perturbed(dit("DiT-tiny")), batch()
    loss = DiffusionLoss(Process(), multiplicity=3, label_dropout=0.5)
    draws = loss.draw(images)
    together = loss.at(model, images, labels, draws)
    singles = [
        loss.at(
            model, images, labels, Draws(draws.timesteps[:, k : k + 1], draws.noise[:, k : k + 1], draws.drop_label)
        )
        for k in range(3)
    ]
    assert together.shape == (4,)
    torch.testing.assert_close(together, torch.stack(singles).mean(0))


def test_rows_lie_together_and_share_one_coin():
    seen = {}

    def model(x, t, y, drop_label):
        seen.update(x=x, t=t, y=y, drop_label=drop_label)
        return torch.zeros_like(x)

    torch.manual_seed(0)
    loss = DiffusionLoss(Process(), multiplicity=5, label_dropout=0.5, num_classes=10)
    losses = loss(model, batch(8))
    assert losses.shape == (8,) and loss.rows_per_example == 5
    assert seen["y"].view(8, 5).eq(torch.arange(8)[:, None]).all()
    coins = seen["drop_label"].view(8, 5)
    assert coins.eq(coins[:, :1]).all() and 0 < coins[:, 0].sum() < 8
    assert (seen["t"].view(8, 5) // 200 == torch.arange(5)).all()  # stratified


def test_perfect_prediction_has_no_loss():
    images, labels = batch()
    for prediction in ("epsilon", "v", "sample"):
        loss = DiffusionLoss(Process(prediction=prediction), multiplicity=2)
        draws = loss.draw(images)
        target = loss.process.target(
            images.repeat_interleave(2, 0), draws.noise.flatten(0, 1), draws.timesteps.flatten()
        )
        assert not loss.at(lambda *args, target=target, **kw: target, images, labels, draws).any()


def test_seeded_draws_repeat():
    images, labels = batch()
    model = perturbed(dit("DiT-tiny")).eval()
    first, second = (
        DiffusionLoss(Process(), 2, generator=torch.Generator().manual_seed(5))(model, (images, labels))
        for _ in range(2)
    )
    assert torch.equal(first, second)


def test_no_dropout_hides_nothing():
    images, _ = batch()
    assert not DiffusionLoss(Process(), label_dropout=0.0).draw(images).drop_label.any()
    assert DiffusionLoss(Process(), label_dropout=1.0).draw(images).drop_label.all()


def test_empty_batch():
    assert DiffusionLoss(Process(), 3, num_classes=10)(dit("DiT-tiny"), batch(0)).shape == (0,)


def test_engine_clips_images_not_rows():
    model, (images, labels) = perturbed(dit("DiT-tiny")), batch()
    loss = DiffusionLoss(Process(), multiplicity=3)
    draws = loss.draw(images)
    result = dither.clipped_sum(model, lambda: loss.at(model, images, labels, draws), max_grad_norm=1e-3)
    assert result.norms.shape == (4,)
    for index in range(4):
        one = Draws(
            draws.timesteps[index : index + 1], draws.noise[index : index + 1], draws.drop_label[index : index + 1]
        )
        value = loss.at(model, images[index : index + 1], labels[index : index + 1], one).sum()
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        gradients = torch.autograd.grad(value, parameters)
        norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
        torch.testing.assert_close(result.norms[index].float(), norm, rtol=1e-4, atol=1e-5)


def test_learned_variance_is_trained_and_leaves_the_mean_alone():
    model, (images, labels) = perturbed(dit("DiT-tiny", learn_sigma=True)), batch()
    loss = DiffusionLoss(Process(learn_sigma=True), multiplicity=2)
    losses = loss(model, (images, labels))
    assert losses.shape == (4,) and losses.isfinite().all()
    losses.sum().backward()
    assert model.final_layer.linear.weight.grad[1].any()


def test_variational_term_is_least_at_the_true_posterior():
    """With the true noise predicted, the KL is zero at the posterior variance (fraction -1) and grows from there."""
    process = Process(learn_sigma=True)
    x_0, noise, t = torch.rand(3, 1, 8, 8) * 2 - 1, torch.randn(3, 1, 8, 8), torch.tensor([2, 5, 20])
    x_t = process.add_noise(x_0, noise, t)
    at = [variational_bound(process, x_0, x_t, t, noise, torch.full_like(x_0, v)) for v in (-1.0, 0.0, 1.0)]
    torch.testing.assert_close(at[0], torch.zeros(3), atol=1e-4, rtol=0)
    assert (at[1] > at[0]).all() and (at[2] > at[1]).all()
    first = variational_bound(process, x_0, x_t, torch.zeros(3, dtype=torch.int64), noise, torch.zeros_like(x_0))
    assert first.isfinite().all() and (first > 0).all()


def test_wrong_settings_are_named():
    with pytest.raises(ConfigurationError):
        DiffusionLoss(Process(), 0)
    with pytest.raises(ConfigurationError):
        DiffusionLoss(Process(), label_dropout=1.5)
    with pytest.raises(LabelError, match="10"):
        DiffusionLoss(Process(), num_classes=10)(dit("DiT-tiny"), (batch(1)[0], torch.tensor([10])))
