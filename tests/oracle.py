"""The reference: plain autograd on one example's loss at a time, in the model's own precision."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def per_example_gradients(model: nn.Module, loss_fn: Callable[[], Tensor]) -> dict[str, Tensor]:
    """By parameter name, (B, *shape): B backward passes of one loss each through one ordinary forward."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    losses = loss_fn()
    rows: dict[str, list[Tensor]] = {name: [] for name in parameters}
    for loss in losses:
        gradients = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True, allow_unused=True)
        for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
            rows[name].append(torch.zeros_like(parameter) if gradient is None else gradient)
    return {name: torch.stack(found) for name, found in rows.items()}


def norms(gradients: dict[str, Tensor]) -> Tensor:
    """(B,) norms over all parameters."""
    return sum(g.double().reshape(len(g), -1).square().sum(1) for g in gradients.values()).sqrt()


def clipped_sum(gradients: dict[str, Tensor], max_grad_norm: float) -> dict[str, Tensor]:
    """Sum of gradients scaled to norm at most `max_grad_norm`, computed example by example."""
    factors = (max_grad_norm / norms(gradients)).clamp(max=1.0)
    return {name: torch.einsum("b,b...->...", factors.to(g.dtype), g) for name, g in gradients.items()}


def relative_error(ours: dict[str, Tensor], truth: dict[str, Tensor]) -> float:
    """Norm of the difference over all parameters, relative to the truth's norm."""
    assert ours.keys() == truth.keys()
    wrong = sum(float((ours[n].double() - truth[n].double()).square().sum()) for n in truth) ** 0.5
    size = sum(float(truth[n].double().square().sum()) for n in truth) ** 0.5
    return wrong / size if size else wrong
