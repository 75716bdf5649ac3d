"""Algorithm 2 of Karras et al.: diffusers' Heun where nothing is churned; the right variance where something is."""

from __future__ import annotations

import pytest
import torch
from denoisers import perturbed
from diffusers import HeunDiscreteScheduler

from dither.diffusion import Churn, Process, dit, sample
from dither.diffusion.edm import edm_sample
from dither.errors import ConfigurationError


def gaussian_images(process, deviation, calls=None):
    """The perfect denoiser of independent pixels from N(0, deviation^2), and of nothing else."""

    def denoise(x, t):
        if calls is not None:
            calls.append(int(t))
        alpha_bar = process.alphas_cumprod[t]
        return deviation**2 * alpha_bar.sqrt() / (deviation**2 * alpha_bar + 1 - alpha_bar) * x

    return denoise


def noise_source(count):
    generator = torch.Generator().manual_seed(0)
    return lambda: torch.randn((count, 1, 4, 4), generator=generator)


def test_without_churn_it_is_heun_of_diffusers():
    process, start, times = Process(), noise_source(4)(), []
    perfect = gaussian_images(process, 0.5, times)
    ours = edm_sample(lambda x, t: perfect(x, t).sin(), process, lambda: start, 8, Churn(), lambda: None)
    scheduler = HeunDiscreteScheduler(**process.scheduler_settings(), beta_start=1e-4, beta_end=0.02)
    scheduler.set_timesteps(timesteps=sorted(set(times), reverse=True))
    x = start * scheduler.sigmas[0]
    for t in scheduler.timesteps.long():
        scaled, alpha_bar = scheduler.scale_model_input(x, t), process.alphas_cumprod[t]
        epsilon = (scaled - alpha_bar.sqrt() * perfect(scaled, t).sin()) / (1 - alpha_bar).sqrt()
        x = scheduler.step(epsilon, t, x).prev_sample
    assert len(scheduler.timesteps) == 15
    torch.testing.assert_close(ours, x, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("s_churn", [0.0, 5.0, 40.0])
def test_variance_survives_churn(s_churn):
    process, calls, steps = Process(), [], []
    denoise = gaussian_images(process, 0.5, calls)
    drawn = edm_sample(denoise, process, noise_source(4000), 200, Churn(s_churn), lambda: steps.append(1))
    assert abs(drawn.std().item() - 0.5) < 0.01 and abs(drawn.mean().item()) < 0.01
    assert len(calls) == 399 and len(steps) == 200


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_of_16_bits_draws_what_float64_does(dtype):
    """To two of its roundings: a cosine schedule begins at a noise of 2e4, near float16's largest number."""
    process, start = Process(beta_schedule="squaredcos_cap_v2"), noise_source(16)()
    perfect, seen = gaussian_images(process, 0.5), set()

    def drawn(dtype):
        def denoise(x, t):
            seen.add(x.dtype)
            return perfect(x.double(), t).to(dtype)

        return edm_sample(denoise, process, lambda: start.to(dtype), 40, Churn(), lambda: None)

    found = drawn(dtype)
    assert found.dtype == dtype and seen == {dtype}
    expected = drawn(torch.float64)
    assert float((found.double() - expected).norm() / expected.norm()) < 2 * torch.finfo(dtype).eps


def test_churn_adds_noise_only_within_its_levels():
    process = Process()
    model = perturbed(dit("DiT-tiny"))
    settings = {"process": process, "sampler": "edm", "steps": 6, "seed": 1}
    plain = sample(model, [2, 5], **settings)
    assert torch.equal(plain, sample(model, [2, 5], churn=Churn(2.0, s_min=1e6), **settings))
    assert torch.equal(plain, sample(model, [2, 5], churn=Churn(2.0, s_max=1e-6), **settings))
    assert not torch.equal(plain, sample(model, [2, 5], churn=Churn(2.0), **settings))
    noisier = sample(model, [2, 5], churn=Churn(2.0, s_noise=1.5), **settings)
    assert not torch.equal(noisier, sample(model, [2, 5], churn=Churn(2.0), **settings))


def test_negative_churn_is_refused():
    reversed_levels, no_level = {"s_max": 1.0, "s_min": 5.0}, {"s_max": float("nan")}
    for wrong in ({"s_churn": -1.0}, {"s_noise": float("nan")}, {"s_min": -0.1}, reversed_levels, no_level):
        with pytest.raises(ConfigurationError, match=next(iter(wrong))):
            Churn(**wrong)
