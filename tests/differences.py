"""Losses that take differences of outputs and targets, an entry each."""

from __future__ import annotations

import pytest
import torch.nn.functional as F

LOSSES = {
    "mse": lambda output, target: F.mse_loss(output, target, reduction="none"),
    "l1": lambda output, target: F.l1_loss(output, target, reduction="none"),
    "smooth_l1": lambda output, target: F.smooth_l1_loss(output, target, reduction="none"),
    "huber": lambda output, target: F.huber_loss(output, target, reduction="none"),
    "squares": lambda output, target: (output - target) ** 2,
    "absolute": lambda output, target: output.subtract(target).abs(),
}
each_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
