"""The stochastic sampler of Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative Models".

diffusers has its second-order steps (`HeunDiscreteScheduler`, with which this file agrees where nothing is churned)
but not its churn: `EulerDiscreteScheduler` adds the noise after the network was called, so that a network that
predicts noise never removes it.

Shapes: N images, x and x_0 (N, C, H, W).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dither.diffusion.process import Process
from dither.errors import ConfigurationError

_RHO = 7.0  # eq. 5 and table 1: how much denser the levels are where there is little noise


@dataclass(frozen=True)
class Churn:
    """How much fresh noise each step adds before it denoises (algorithm 2, lines 4 to 6).

    Args:
        s_churn: amount over the whole run; 0 adds none, 40 is the paper's for 256 steps on ImageNet.
        s_noise: standard deviation of the fresh noise, a little above 1 to make up for what the denoiser loses.
        s_min: noise level below which nothing is added, in units of the clean image's scale.
        s_max: noise level above which nothing is added.

    Raises:
        ConfigurationError: a negative amount, or no level between `s_min` and `s_max`.
    """

    s_churn: float = 0.0
    s_noise: float = 1.0
    s_min: float = 0.0
    s_max: float = float("inf")

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        for name in ("s_churn", "s_noise", "s_min"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ConfigurationError(
                    f"{name} {getattr(self, name)} is not a number from 0 on", fix="s_churn 0 and s_noise 1 add nothing"
                )
        if not self.s_min <= self.s_max:
            raise ConfigurationError(
                f"s_max {self.s_max} is not at least s_min {self.s_min}",
                fix="leave both out: noise is added at all levels",
            )

    def factor(self, level: float, steps: int) -> float:
        """By how much a step at this noise level first raises it (gamma of algorithm 2, plus 1)."""
        if not self.s_min <= level <= self.s_max:
            return 1.0
        return 1.0 + min(self.s_churn / steps, 2**0.5 - 1)


def edm_sample(
    denoise: Callable[[Tensor, Tensor], Tensor],
    process: Process,
    noise: Callable[[], Tensor],
    steps: int,
    churn: Churn,
    progress: Callable[[], None],
) -> Tensor:
    """Draw images by algorithm 2: churn, an Euler step, Heun's correction.

    The network knows `process.timesteps` noise levels; those asked for are rounded to the nearest, as the paper does
    for networks trained on discrete levels (appendix C.3.4).

    The image is kept in float32 or wider at the scale of its noise, which a cosine schedule brings to 2e4: in float16
    that overflows, and in bfloat16 the steps round it away.

    Args:
        denoise: from x_t (scaled as in training, of the noise's dtype) and t, 0-dimensional int64, to the predicted
            clean image.
        process: the process the network was trained with.
        noise: draws standard normal noise (N, C, H, W).
        steps: noise levels; the network is called 2 * steps - 1 times.
        churn: fresh noise.
        progress: called after each step.

    Returns:
        Images (N, C, H, W) of the noise's dtype.
    """
    start = noise()
    x, alpha_bar = start.to(torch.promote_types(start.dtype, torch.float32)), process.alphas_cumprod.to(start.device)
    levels = ((1 - alpha_bar) / alpha_bar).sqrt()  # standard deviation of the noise on an image of full scale

    def nearest(level: Tensor | float) -> Tensor:
        return (levels - level).abs().argmin()

    def clean(x: Tensor, t: Tensor) -> Tensor:
        return denoise((x * alpha_bar[t].sqrt()).to(start.dtype), t)

    grid = torch.linspace(float(levels[-1]) ** (1 / _RHO), float(levels[0]) ** (1 / _RHO), steps) ** _RHO
    times = [nearest(level) for level in grid.tolist()]
    x = x * levels[times[0]]
    for index, t in enumerate(times):
        t_hat = nearest(float(levels[t]) * churn.factor(float(levels[t]), steps))
        level, level_hat = levels[t], levels[t_hat]
        if level_hat > level:
            x = x + (level_hat**2 - level**2).sqrt() * churn.s_noise * noise()
        slope = (x - clean(x, t_hat)) / level_hat
        if index + 1 == steps:
            x = x - level_hat * slope
        else:
            after = times[index + 1]
            euler = x + (levels[after] - level_hat) * slope
            corrected = (euler - clean(euler, after)) / levels[after]
            x = x + (levels[after] - level_hat) * (slope + corrected) / 2
        progress()
    return x.to(start.dtype)
