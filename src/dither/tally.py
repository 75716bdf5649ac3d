"""What a step reports: epsilon, and statistics of its batch that are not private."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dither.clipping.clipped_sum import ClippedSum


@dataclass(frozen=True)
class Step:
    """What one completed step reports.

    Attributes:
        index: number of completed steps, from 1.
        epsilon: spent so far, at the run's delta; an upper bound, exact at the last step.
        batch_size: number of examples drawn. Not private.
        loss: mean over the batch's finite losses, nan for an empty batch. Not private.
        clip_fraction: share of the batch whose gradient was longer than max_grad_norm. Not private.
        dropped: number of examples left out because their gradient was not finite. Not private.
    """

    index: int
    epsilon: float
    batch_size: int
    loss: float
    clip_fraction: float
    dropped: int = 0


@dataclass
class Tally:
    """Non-private statistics of one logical batch, left on the device until the end."""

    losses: list[Tensor] = field(default_factory=list)
    finite: list[Tensor] = field(default_factory=list)
    clipped: list[Tensor] = field(default_factory=list)
    examples: int = 0
    dropped: int = 0
    verified: bool = False

    def add(self, result: ClippedSum, examples: int, max_grad_norm: float) -> None:
        """Count one micro-batch."""
        finite = result.losses.isfinite()
        self.losses.append(torch.where(finite, result.losses, 0.0).double().sum())
        self.finite.append(finite.sum())
        self.clipped.append(((result.norms > max_grad_norm) & result.norms.isfinite()).sum())
        self.examples += examples
        self.dropped += result.dropped

    def step(self, index: int, epsilon: float) -> Step:
        """Report the batch."""
        loss = clip_fraction = math.nan
        if self.examples:
            loss = float(torch.stack(self.losses).sum() / torch.stack(self.finite).sum())
            clip_fraction = float(torch.stack(self.clipped).sum()) / self.examples
        return Step(index, epsilon, self.examples, loss, clip_fraction, self.dropped)
