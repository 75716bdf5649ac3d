"""The reference: plain autograd on one example's loss at a time, in the model's own precision."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


@torch.compiler.set_stance("force_eager")  # compiled code may refuse a second backward pass
def per_example_gradients(model: nn.Module, loss_fn: Callable[[], Tensor]) -> dict[str, Tensor]:
    """By parameter name, (B, *shape): B backward passes of one loss each through one ordinary forward, as written."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    losses = loss_fn()
    rows: dict[str, list[Tensor]] = {name: [] for name in parameters}
    for loss in losses:
        gradients = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True, allow_unused=True)
        for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
            rows[name].append(torch.zeros_like(parameter) if gradient is None else gradient)
    return {name: torch.stack(found) for name, found in rows.items()}


def norms(gradients: dict[str, Tensor]) -> Tensor:
    """(B,) norms over all parameters; of a complex number, both parts count."""
    return sum(_squares(g).reshape(len(g), -1).sum(1) for g in gradients.values()).sqrt()


def clipped_sum(gradients: dict[str, Tensor], max_grad_norm: float) -> dict[str, Tensor]:
    """Sum of gradients scaled to norm at most `max_grad_norm`, computed example by example."""
    factors = (max_grad_norm / norms(gradients)).clamp(max=1.0)
    return {name: torch.einsum("b,b...->...", factors.to(g.dtype), g) for name, g in gradients.items()}


def relative_error(ours: dict[str, Tensor], truth: dict[str, Tensor]) -> float:
    """Norm of the difference over all parameters, relative to the truth's norm; both parts count."""
    assert ours.keys() == truth.keys()
    assert all(ours[n].is_complex() == truth[n].is_complex() for n in truth)
    wrong = sum(float(_squares(_parts(ours[n]).double() - _parts(truth[n]).double()).sum()) for n in truth) ** 0.5
    size = sum(float(_squares(truth[n]).sum()) for n in truth) ** 0.5
    return wrong / size if size else wrong


def _squares(values: Tensor) -> Tensor:
    """Squares of the real numbers, in float64."""
    return _parts(values).double().square()


def _parts(values: Tensor) -> Tensor:
    """Real and imaginary parts on an axis of their own; a real tensor as it is."""
    return torch.view_as_real(values.resolve_conj()) if values.is_complex() else values
