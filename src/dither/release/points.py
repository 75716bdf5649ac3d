"""Sums over points, each scaled down to a norm: what one point adds is bounded by it.

Legend: n points, L or R coordinates, G groups.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

COUNT_WEIGHT = 0.5
"""Of a point in its group's count, in units of the clip norm."""
_CHUNK = 8192  # points summed at once


def clipped(points: Tensor, norm: float) -> Tensor:
    """Points (n, R), those longer than the norm scaled down to it."""
    scaled: Tensor = points * (norm / points.norm(dim=1, keepdim=True)).clamp(max=1.0)
    return scaled


def squared_lengths(points: Tensor) -> Tensor:
    """Of points (n, R): (n,)."""
    squares: Tensor = torch.linalg.vecdot(points, points)
    return squares


def total(points: Tensor, norm: float) -> Tensor:
    """The sum of clipped points (n, L): (L,). One moves it by at most the norm."""
    return torch.stack([clipped(part, norm).sum(0) for part in points.split(_CHUNK)]).sum(0)


def moments(points: Tensor, norm: float) -> Tensor:
    """The sum of outer products of clipped points (n, L): (L, L). One moves it by at most the norm's square."""
    products = points.new_zeros(points.shape[1], points.shape[1])
    for part in points.split(_CHUNK):
        scaled = clipped(part, norm)
        products.addmm_(scaled.T, scaled)
    return products


def group_sums(points: Tensor, groups: Tensor, count: int, norm: float) -> Tensor:
    """Sums of clipped points (n, R) of each group, and last its number of points, weighed: (G, R + 1).

    One point moves it by at most norm sqrt(1 + COUNT_WEIGHT^2).

    Args:
        points: (n, R).
        groups: of each point, (n,).
        count: G.
        norm: clip norm.
    """
    sums = points.new_zeros(count, points.shape[1] + 1)
    return sums.index_add_(0, groups, F.pad(clipped(points, norm), (0, 1), value=COUNT_WEIGHT * norm))


def counts_of(sums: Tensor, norm: float) -> Tensor:
    """The numbers of points that `group_sums` (..., R + 1) say: (...)."""
    return sums[..., -1] / (COUNT_WEIGHT * norm)
