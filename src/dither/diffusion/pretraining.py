"""Ordinary training on what is private output or public already: before the noisy steps, at no cost in privacy."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dither.diffusion.loss import DiffusionLoss
from dither.errors import ConfigurationError


def pretrain(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    loss: DiffusionLoss,
    *,
    steps: int = 300,
    learning_rate: float = 1e-3,
    batch_size: int = 64,
) -> None:
    """Train the model with Adam, without clipping and noise.

    Guarantee: none of its own. What goes in must be released or public: then this is post-processing.

    Args:
        model: changed in place.
        images: (N, C, H, W) in [-1, 1]: released class means, or public images.
        labels: (N,) int64.
        loss: as in the private training after it.
        steps: optimizer steps; the rate falls to zero over them.
        learning_rate: of the first step.
        batch_size: images of a step, drawn with replacement.

    Raises:
        ConfigurationError: steps, learning_rate or batch_size are not positive.
    """
    for name, value in (("steps", steps), ("learning_rate", learning_rate), ("batch_size", batch_size)):
        if not value > 0:
            raise ConfigurationError(f"{name} {value} is not above 0", fix="300 steps of 64 images at 1e-3")
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    device = parameters[0].device
    images, labels = images.to(device), labels.to(device)
    optimizer = torch.optim.Adam(parameters, lr=learning_rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    for _ in range(steps):
        chosen = torch.randint(len(images), (batch_size,), device=device)
        optimizer.zero_grad()
        loss(model, (images[chosen], labels[chosen])).mean().backward()
        optimizer.step()
        schedule.step()
    optimizer.zero_grad()
