"""Flow matching, weightings, and how timesteps are drawn: exact for the engine, agreed on by samplers."""

from __future__ import annotations

import pytest
import torch
from denoisers import perturbed
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from torch import nn

import dither
from dither.diffusion import FLOW_SAMPLERS, DiffusionLoss, Process, TimestepDistribution, dit, sample
from dither.errors import ConfigurationError

PREDICTIONS = ("epsilon", "v", "sample", "edm", "flow")
DISTRIBUTIONS = {
    "uniform": TimestepDistribution(),
    "log_normal": TimestepDistribution("log_normal"),
    "biased": TimestepDistribution("biased", pieces=((0, 200, 3.0), (200, 1000, 1.0))),
}


def test_flow_is_a_straight_line():
    process, t = Process(prediction="flow"), torch.tensor([1, 400, 1000])
    x_0, noise = torch.randn(3, 1, 8, 8), torch.randn(3, 1, 8, 8)
    x_t, level = process.add_noise(x_0, noise, t), (t / 1000).view(3, 1, 1, 1)
    torch.testing.assert_close(x_t, (1 - level) * x_0 + level * noise)
    torch.testing.assert_close(x_t - level * process.target(x_0, noise, t), x_0)
    scheduler = process_scheduler(process)
    torch.testing.assert_close(scheduler.sigmas[:-1], scheduler.timesteps / 1000)  # what the network is told


def process_scheduler(process):
    scheduler = FlowMatchEulerDiscreteScheduler(**process.scheduler_settings())
    scheduler.set_timesteps(7)
    return scheduler


class KnowsTheImage(nn.Module):
    """Predicts the direction from class y's constant image to x_t's noise."""

    in_channels, input_size = 1, 8

    def __init__(self):
        super().__init__()
        self.values = nn.Parameter(torch.linspace(-0.8, 0.8, 10))

    def forward(self, x, t, y, drop_label):
        return (x - self.values[y].view(-1, 1, 1, 1)) / (t.view(-1, 1, 1, 1) / 1000).clamp(min=1e-3)


@pytest.mark.parametrize("sampler", FLOW_SAMPLERS)
def test_a_perfect_flow_gives_its_image(sampler):
    model = KnowsTheImage()
    images = sample(model, torch.arange(10), process=Process(prediction="flow"), sampler=sampler, steps=20, seed=0)
    expected = model.values.detach().view(-1, 1, 1, 1).expand(-1, 1, 8, 8)
    torch.testing.assert_close(images, expected, atol=0.05, rtol=0)


def test_samplers_of_the_other_kind_are_refused():
    for prediction, sampler in (("flow", "ddim"), ("flow", "ddpm"), ("v", "euler")):
        with pytest.raises(ConfigurationError, match="Fix:"):
            sample(dit("DiT-tiny"), [0], process=Process(prediction=prediction), sampler=sampler, steps=2)


@pytest.mark.parametrize("weighting", ["min_snr", "truncated_snr", "edm"])
def test_a_weighting_is_of_the_image_s_error_whatever_is_predicted(weighting):
    """Move the prediction so that x_0 is off by one everywhere: every target then has the same weighted loss."""
    for level in (40, 500, 900):
        losses = []
        for prediction in ("epsilon", "v", "sample", "edm"):
            process = Process(prediction=prediction, weighting=weighting)
            t = torch.tensor([level])
            x_0, noise = torch.zeros(1, 1, 2, 2), torch.randn(1, 1, 2, 2)
            x_t = process.add_noise(x_0, noise, t)
            signal, scale = (part.view(-1, 1, 1, 1) for part in process.signal_and_noise(t))
            moved = x_0 + 1  # as the network believes; its noise then follows from x_t
            error = process.target(x_0, noise, t) - {
                "edm": (moved - process.denoiser_output(torch.zeros_like(x_t), x_t, t))
                / (process.denoiser_output(torch.ones_like(x_t), x_t, t) - process.denoiser_output(0 * x_t, x_t, t))
            }.get(prediction, process.target(moved, (x_t - signal * moved) / scale, t))
            losses.append(error.square().mean() * process.weight(t))
        torch.testing.assert_close(torch.stack(losses).flatten(), losses[2].expand(4).flatten(), rtol=1e-3, atol=1e-6)


def test_the_weight_of_flow():
    t = torch.tensor([250])
    snr, per_x_0 = 9.0, 16.0  # (0.75 / 0.25)^2; an x_0 error of 1 is a direction's error of 1 / 0.25
    for weighting, expected in (("uniform", 1.0), ("snr", snr), ("min_snr", 5 / per_x_0), ("truncated_snr", 9 / 16)):
        weight = Process(prediction="flow", weighting=weighting).weight(t)
        torch.testing.assert_close(weight, torch.tensor([expected]))


@pytest.mark.parametrize("prediction", ["v", "flow"])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("stratified", [False, True])
def test_draws_follow_the_distribution(prediction, name, stratified):
    process = Process(prediction=prediction, timestep_distribution=DISTRIBUTIONS[name])
    draws = process.draw_timesteps(5000, 4, stratified=stratified, generator=torch.Generator().manual_seed(0))
    first = 1 if prediction == "flow" else 0
    assert draws.min() >= first and draws.max() <= 999 + first
    found = torch.bincount(draws.flatten() - first, minlength=1000).double().cumsum(0) / draws.numel()
    distance = (found - process.timestep_probabilities.cumsum(0)).abs().max()
    assert distance < 1.95 / 20000**0.5  # Kolmogorov and Smirnov: beyond this once in a thousand


def test_log_normal_is_normal_in_the_logarithm_and_biased_in_its_pieces():
    flow = Process(prediction="flow", timestep_distribution=TimestepDistribution("log_normal", mean=0.0, std=1.0))
    below = flow.timestep_probabilities[:500].sum()  # logit(0.5) = 0 is the median
    assert abs(below - 0.5) < 1e-3
    ratio = (1 - Process().alphas_cumprod).sqrt() / Process().alphas_cumprod.sqrt()
    process = Process(timestep_distribution=DISTRIBUTIONS["log_normal"])
    assert abs(process.timestep_probabilities[ratio.log() < -1.2].sum() - 0.5) < 0.02
    biased = Process(timestep_distribution=DISTRIBUTIONS["biased"]).timestep_probabilities
    assert biased[:200].sum() == pytest.approx(0.75) and biased[:200].std() < 1e-12
    narrowed = Process(timestep_distribution=DISTRIBUTIONS["biased"], min_timestep=100, max_timestep=300)
    assert narrowed.timestep_probabilities.nonzero().flatten().tolist() == list(range(100, 300))


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_engine_s_sums_are_exact_with_several_draws(prediction):
    model = perturbed(dit("DiT-tiny", hidden_size=16, depth=1, num_heads=2)).double()
    process = Process(
        prediction=prediction, weighting="min_snr", timestep_distribution=TimestepDistribution("log_normal", 0.0, 1.0)
    )
    loss = DiffusionLoss(process, multiplicity=3)
    images, labels = torch.rand(4, 1, 8, 8, dtype=torch.float64) * 2 - 1, torch.arange(4)
    draws = loss.draw(images)
    report = dither.verify(model, lambda: loss.at(model, images, labels, draws))
    assert report.exact and report.independent and report.examples == 4


def test_wrong_distributions_are_named():
    for wrong in (
        {"name": "normal"},
        {"name": "log_normal", "std": 0.0},
        {"name": "biased"},
        {"pieces": ((0, 10, 1.0),)},
        {"name": "biased", "pieces": ((10, 10, 1.0),)},
        {"name": "biased", "pieces": ((0, 10, -1.0),)},
    ):
        with pytest.raises(ConfigurationError, match="Fix:"):
            TimestepDistribution(**wrong)
    for pieces in (((0, 2000, 1.0),), ((0, 10, 1.0),)):
        process = Process(min_timestep=20, timestep_distribution=TimestepDistribution("biased", pieces=pieces))
        with pytest.raises(ConfigurationError, match="Fix:"):
            DiffusionLoss(process)
