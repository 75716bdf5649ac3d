"""Activations with a parameter: the slope of PReLU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dither.capture.uses import ParamUse
from dither.rules.affine import channel_sum
from dither.rules.rule import Rule, register_rule


class Slope(Rule):
    """Slope of PReLU, one number or one a channel (axis 1): the gradient times the input where it is negative."""

    def per_example_gradient(self, use: ParamUse, grad_output: Tensor, out: Tensor | None = None) -> Tensor:
        """Sum of g * min(x, 0) over everything that shares the slope."""
        entries: Tensor = grad_output * use.operand("input").clamp(max=0)
        if use.parameter.numel() > 1:
            return channel_sum(use, entries)
        if entries.dim() == 0:
            return entries.reshape(1, *use.parameter.shape)
        sums: Tensor = use.examples.split(entries).flatten(1).sum(1)
        return sums.reshape(use.batch, *use.parameter.shape)


register_rule((F.prelu, torch.Tensor.prelu), ("input", "weight"), {"weight": Slope()})
