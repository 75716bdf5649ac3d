"""The variational term that trains a learned reverse variance.

Source: Nichol & Dhariwal 2021, "Improved Denoising Diffusion Probabilistic Models", sec. 3.1.

Shapes: R rows, images (R, C, H, W), timesteps (R,).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dither.diffusion.process import Process


def variational_bound(
    process: Process, x_0: Tensor, x_t: Tensor, t: Tensor, epsilon: Tensor, fraction: Tensor
) -> Tensor:
    """Return one timestep's term of the variational bound, in bits per dimension, (R,).

    The mean is held fixed (no gradient through `epsilon`), so the term trains the variance alone; added
    to the simple loss it is the paper's hybrid with weight 1 / timesteps on the whole bound.

    Args:
        process: the forward process.
        x_0: clean images in [-1, 1].
        x_t: noised images.
        t: timesteps.
        epsilon: predicted noise.
        fraction: the network's second half; -1 is the smallest variance, 1 the largest (eq. 15).
    """
    alpha_bar = process.alphas_cumprod.to(t.device)
    before = torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]])
    beta = 1 - alpha_bar / before
    posterior = beta * (1 - before) / (1 - alpha_bar)
    # The posterior variance is 0 at t = 0; its neighbour stands in, as in the paper.
    log_posterior = torch.cat([posterior[1:2], posterior[1:]]).log()

    def at(table: Tensor) -> Tensor:
        return table[t].view(-1, 1, 1, 1)

    on_x_0 = at(beta * before.sqrt() / (1 - alpha_bar))
    on_x_t = at((1 - before) * (alpha_bar / before).sqrt() / (1 - alpha_bar))
    predicted_x_0 = (x_t - at(1 - alpha_bar).sqrt() * epsilon.detach()) / at(alpha_bar).sqrt()
    difference = on_x_0 * (x_0 - predicted_x_0.clamp(-1, 1))
    log_true = at(log_posterior)
    share = (fraction + 1) / 2
    log_model = share * at(beta.log()) + (1 - share) * log_true
    divergence = 0.5 * (log_model - log_true - 1 + (log_true - log_model).exp() + difference**2 * (-log_model).exp())
    mean = on_x_0 * predicted_x_0.clamp(-1, 1) + on_x_t * x_t
    first = -_discretised_log_likelihood(x_0, mean, log_model)
    term = torch.where(t.view(-1, 1, 1, 1) == 0, first, divergence)
    return term.flatten(1).mean(1) / math.log(2.0)


def _discretised_log_likelihood(x_0: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Log-probability of 8-bit values in [-1, 1] under a Gaussian integrated over each bin."""
    inverse = (-0.5 * log_variance).exp()
    upper = torch.special.ndtr(inverse * (x_0 - mean + 1 / 255))
    lower = torch.special.ndtr(inverse * (x_0 - mean - 1 / 255))
    inside = torch.where(x_0 < -0.999, upper, torch.where(x_0 > 0.999, 1 - lower, upper - lower))
    return inside.clamp(min=1e-12).log()
