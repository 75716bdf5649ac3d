"""Verification: the recorded gradients against plain autograd, one example at a time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dither.capture.coverage import check_loss
from dither.clipping.backward import LossFunction, trainable
from dither.clipping.clipped_sum import clipped_sum, per_example_gradients
from dither.clipping.plan import PlannedUse

_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4}


@dataclass(frozen=True)
class VerificationReport:
    """What the comparison found.

    Attributes:
        exact: whether every parameter's error is within the dtype's tolerance (1e-8 float64, 1e-4 float32, else 5e-2).
        max_relative_error: the largest error over parameters, relative to the oracle's norm over all examples.
        errors: that error by parameter name.
        uses: every recorded use, with the strategy "auto" takes for it.
        examples: number of examples compared.
    """

    exact: bool
    max_relative_error: float
    errors: dict[str, float]
    uses: tuple[PlannedUse, ...]
    examples: int

    def __str__(self) -> str:
        """The verdict, then one line a parameter."""
        verdict = "exact" if self.exact else "NOT EXACT"
        lines = [f"{verdict}: largest relative error {self.max_relative_error:.1e} over {self.examples} examples"]
        return "\n".join(lines + [f"  {name}: {error:.1e}" for name, error in self.errors.items()])


def verify(model: nn.Module, loss_fn: LossFunction) -> VerificationReport:
    """Compare per-example gradients with autograd's, one example's loss at a time.

    The loss function is called three times from the same random state (CPU and the current accelerator), so it must
    use the same examples each time.

    Args:
        model: any module.
        loss_fn: no arguments; returns one loss per example, shape (B,).

    Returns:
        The largest relative error, by parameter, and the uses.

    Raises:
        CaptureError: its kinds, as `clipped_sum`.
    """
    parameters = trainable(model)
    devices = sorted({p.device.index or 0 for p in parameters.values() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        recorded = per_example_gradients(model, loss_fn)
    with torch.random.fork_rng(devices=devices):
        plan = clipped_sum(model, loss_fn).plan
    with torch.enable_grad():
        losses = check_loss(loss_fn())
    squared = {name: [0.0, 0.0] for name in parameters}
    for example in range(losses.shape[0]):
        oracle = torch.autograd.grad(losses[example], list(parameters.values()), retain_graph=True, allow_unused=True)
        for name, gradient in zip(parameters, oracle, strict=True):
            ours = recorded[name][example].double()
            truth = torch.zeros_like(ours) if gradient is None else gradient.double()
            squared[name][0] += _squared(ours - truth)
            squared[name][1] += _squared(truth)
    errors = {name: _relative(wrong, size) for name, (wrong, size) in squared.items()}
    worst = max(errors.values())
    dtype = next(iter(parameters.values())).dtype
    return VerificationReport(worst <= _TOLERANCE.get(dtype, 5e-2), worst, errors, plan.uses, losses.shape[0])


def _squared(tensor: Tensor) -> float:
    return float(tensor.abs().square().sum())


def _relative(wrong: float, size: float) -> float:
    if wrong == 0.0:
        return 0.0
    return float("inf") if size == 0.0 else (wrong / size) ** 0.5
