"""The "DiT-L (simplified)", under standard and flash clipping. The document's fourth suite."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from opacus import GradSampleModule
from opacus.grad_sample import GradSampleModuleFastGradientClipping
from opacus.optimizers import DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping
from seed_cases import (
    clipped_sum,
    dit,
    dit_batch,
    example_error,
    median_norm,
    named,
    one_at_a_time,
    parameter_error,
    per_example_mse,
    within,
)

import oracle

pytestmark = pytest.mark.usefixtures("installed")

SIMPLIFIED = {
    "img_size": 32, "patch_size": 4, "in_channels": 3, "hidden_size": 128, "depth": 2, "num_heads": 4,
    "num_classes": 10, "class_dropout_prob": 0.1,
}  # fmt: skip
"""Exactly as many parameters as the document says, the position table's 8192 among them."""


def test_dit_l_simplified():
    """Standard and flash clipping. Which labels are dropped is said (none), so that examples can go alone."""
    assert sum(p.numel() for p in dit(**SIMPLIFIED).parameters() if p.requires_grad) == 698_160
    images, timesteps, labels, target = batch = dit_batch(4, **SIMPLIFIED)
    keep = torch.zeros(4, dtype=torch.bool)

    def losses(model, images, timesteps, labels, target, keep):
        return per_example_mse(model(images, timesteps, labels, keep), target)

    truth = one_at_a_time(dit(**SIMPLIFIED), losses, *batch, keep)
    wrapped = GradSampleModule(dit(**SIMPLIFIED))
    F.mse_loss(wrapped(images, timesteps, labels, keep), target).backward()
    ours = named(wrapped, "grad_sample")
    within("per-example gradients", example_error(ours, truth))
    within("per-example gradients, worst parameter", parameter_error(ours, truth))
    within("position table", example_error({"": ours["pos_embed"]}, {"": truth["pos_embed"]}))

    bound = median_norm(truth)
    flash = GradSampleModuleFastGradientClipping(dit(**SIMPLIFIED), max_grad_norm=bound)
    inner = torch.optim.Adam(flash.parameters())
    optimizer = DPOptimizerFastGradientClipping(inner, noise_multiplier=1.0, max_grad_norm=bound, expected_batch_size=4)
    loss = DPLossFastGradientClipping(flash, optimizer, torch.nn.MSELoss(), "mean")
    loss(flash(images, timesteps, labels, keep), target).backward()
    optimizer.step()
    expected = clipped_sum(truth, bound)
    sums = named(flash, "summed_grad")
    within("clipped sum", oracle.relative_error(sums, expected))
    within("clipped sum, worst parameter", parameter_error(sums, expected))
