"""The forward process: noise levels, targets, weights, timesteps."""

from __future__ import annotations

import pytest
import torch

from dither.diffusion import Process
from dither.errors import ConfigurationError


def test_noise_levels_are_the_linear_schedule():
    process = Process()
    beta = torch.linspace(1e-4, 0.02, 1000)
    torch.testing.assert_close(process.alphas_cumprod, (1 - beta).cumprod(0))


def test_add_noise():
    process, t = Process(), torch.tensor([0, 400, 999])
    x_0, noise = torch.randn(3, 1, 8, 8), torch.randn(3, 1, 8, 8)
    alpha_bar = process.alphas_cumprod[t].view(3, 1, 1, 1)
    torch.testing.assert_close(
        process.add_noise(x_0, noise, t), alpha_bar.sqrt() * x_0 + (1 - alpha_bar).sqrt() * noise
    )


@pytest.mark.parametrize("prediction", ["epsilon", "v", "sample", "edm"])
def test_target_recovers_the_image(prediction):
    process, t = Process(prediction=prediction), torch.tensor([1, 400, 900])
    x_0, noise = torch.randn(3, 1, 8, 8), torch.randn(3, 1, 8, 8)
    x_t, target = process.add_noise(x_0, noise, t), process.target(x_0, noise, t)
    alpha, sigma = (part.sqrt().view(3, 1, 1, 1) for part in (process.alphas_cumprod[t], 1 - process.alphas_cumprod[t]))
    recovered = {
        "epsilon": (x_t - sigma * target) / alpha,
        "v": alpha * x_t - sigma * target,
        "sample": target,
        "edm": process.denoiser_output(target, x_t, t),
    }[prediction]
    torch.testing.assert_close(recovered, x_0, atol=1e-4, rtol=1e-4)


def test_weights_agree_across_predictions():
    """Min-SNR weighs the error of x_0 alike, whatever is predicted."""
    t = torch.tensor([5, 300, 990])
    alpha_bar = Process().alphas_cumprod[t]
    snr = alpha_bar / (1 - alpha_bar)
    # one unit of squared x_0 error is `factor` units of the target's squared error
    for prediction, factor in {
        "sample": torch.ones(3),
        "epsilon": snr,
        "v": 1 / (1 - alpha_bar),
        "edm": snr + 4,
    }.items():
        weight = Process(prediction=prediction, weighting="min_snr").weight(t)
        torch.testing.assert_close(weight * factor, snr.clamp(max=5.0))
    torch.testing.assert_close(Process(weighting="snr").weight(t), snr)
    assert (Process().weight(t) == 1).all()


def test_timesteps_cover_the_range():
    process = Process(timesteps=100, min_timestep=20, max_timestep=60)
    t = process.draw_timesteps(4000, 2)
    assert t.shape == (4000, 2) and t.dtype == torch.int64
    assert set(t.flatten().tolist()) == set(range(20, 60))


def test_stratified_timesteps():
    t = Process().draw_timesteps(500, 4, stratified=True)
    for part in range(4):
        assert (t[:, part] // 250 == part).all()
    assert abs(t.float().mean() - 499.5) < 8


@pytest.mark.parametrize(
    "wrong",
    [
        {"prediction": "noise"},
        {"weighting": "p2"},
        {"sigma_data": 0.0},
        {"beta_schedule": "cubic"},
        {"min_timestep": 5, "max_timestep": 5},
        {"max_timestep": 2000},
        {"learn_sigma": True, "prediction": "v"},
    ],
)
def test_wrong_settings_are_named(wrong):
    with pytest.raises(ConfigurationError, match="Fix:"):
        Process(**wrong)


def test_edm_of_zeros_is_the_wiener_filter():
    """On white images of that deviation, zero output is the posterior mean and the target has unit variance."""
    process = Process(prediction="edm", sigma_data=0.3)
    for level in (10, 300, 900):
        t = torch.full((4000,), level)
        x_0, noise = 0.3 * torch.randn(4000, 1, 2, 2), torch.randn(4000, 1, 2, 2)
        x_t, target = process.add_noise(x_0, noise, t), process.target(x_0, noise, t)
        assert abs(target.std() - 1) < 0.03
        left_over = x_0 - process.denoiser_output(torch.zeros_like(x_t), x_t, t)
        assert abs((left_over * x_t).mean()) < 0.01  # uncorrelated with what was seen
