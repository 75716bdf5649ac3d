"""The lowest spatial frequencies of images, in which any image has most of its variance."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def low_frequencies(shape: Sequence[int], count: int) -> Tensor:
    """The lowest `count` cosine waves over images of a shape (..., H, W), in each channel alike: (D, L) orthonormal.

    Of images of no more entries than that, it is all of them in their own coordinates.
    """
    entries = math.prod(shape)
    if entries <= count:
        return torch.eye(entries, dtype=torch.float64)
    height, width = (1, *shape)[-2:]
    channels = entries // (height * width)
    down, across = _cosines(height), _cosines(width)
    frequency = (torch.arange(height)[:, None] / height).square() + (torch.arange(width) / width).square()
    order = frequency.flatten().argsort(stable=True)[: math.ceil(count / channels)]
    waves = torch.einsum("hk,wk->hwk", down[:, order // width], across[:, order % width]).flatten(0, 1)
    repeated: Tensor = torch.block_diag(*[waves] * channels)
    return repeated


def _cosines(side: int) -> Tensor:
    """The orthonormal discrete cosine transform (of type 2), a wave a column: (side, side)."""
    place, wave = torch.arange(side, dtype=torch.float64), torch.arange(side, dtype=torch.float64)
    waves = torch.cos(math.pi / side * (place[:, None] + 0.5) * wave) * math.sqrt(2 / side)
    waves[:, 0] /= math.sqrt(2)
    return waves
