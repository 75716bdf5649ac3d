"""Covariances of a mixture's components, from noisy second moments (Dwork et al. 2014, "Analyze Gauss", algorithm 1).

Legend: n points, K classes, M components of a class, R coordinates, A axes of a component.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dither.release.clusters import nearest_centres
from dither.release.points import clipped
from dither.release.shared_noise import COVARIANCES_SHARE, SharedNoise

LEFT_WEIGHT = 0.02  # of what directions leave of an image, in the covariances' sums
_LEFT_MOST = 4.0  # of that, in squares of the clip norm
_MIXED = 12.0
"""Points, times the square of the sums' noise multiplier, below which a class's matrix outweighs its component's."""


def second_moments(
    points: Tensor, left: Tensor, labels: Tensor, centres: Tensor, norm: float, noise: SharedNoise
) -> tuple[Tensor, Tensor]:
    """Noisy second moments of each component (K, M, R, R), and what the directions left of its images' squares (K, M).

    Args:
        points: (n, R).
        left: what the directions leave of each image's square, (n,).
        labels: (n,).
        centres: (K, M, R).
        norm: clip norm of a point's distance from its centre.
        noise: of the release.
    """
    classes, components, rank = centres.shape
    nearest = nearest_centres(points, labels, centres)
    moved = points - centres[labels, nearest]
    sums = group_moments(moved, left, labels * components + nearest, classes * components, norm)
    sums = noise.added(sums, math.hypot(1, LEFT_WEIGHT * _LEFT_MOST) * norm**2, COVARIANCES_SHARE)
    return sums[:, :-1].view(classes, components, rank, rank), sums[:, -1].view(classes, components) / LEFT_WEIGHT


def group_moments(points: Tensor, left: Tensor, groups: Tensor, count: int, norm: float) -> Tensor:
    """Second moments of clipped points (n, R) of each group, and last what directions left, weighed: (count, R^2 + 1).

    What an example adds is no longer than norm^2 sqrt(1 + (LEFT_WEIGHT _LEFT_MOST)^2).
    """
    within = clipped(points, norm)
    sums = points.new_zeros(count, points.shape[1] ** 2 + 1)
    for group in range(count):
        own = within[groups == group]
        sums[group, :-1] = (own.T @ own).flatten()
    capped = left.clamp(0, _LEFT_MOST * norm**2) * LEFT_WEIGHT
    sums[:, -1].index_add_(0, groups, capped)
    return sums


def variances_of_the_rest(matrices: Tensor, counts: Tensor, variances: Tensor, outside: float) -> Tensor:
    """The variance along a direction outside a component's axes, and along one outside of all directions: (2,).

    The first is at least the second: directions are those of most variance.

    Args:
        matrices: noisy second moments (K, M, R, R), not divided by the counts.
        counts: (K, M), of the last round of k-means.
        variances: (K, M, A).
        outside: the second.
    """
    size, shares = counts.sum(), counts / counts.sum()
    kept, along = (shares * variances.sum(2)).sum(), (shares * (variances > 0).sum(2)).sum()
    within = (matrices.diagonal(dim1=2, dim2=3).sum() / size - kept) / (matrices.shape[-1] - along).clamp(min=1)
    return torch.stack([within.clamp(min=outside), within.new_tensor(outside)])


def eigen(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, rising, and vectors of noisy matrices, not yet symmetric."""
    values, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
    return values, vectors


def principal_axes(sums: Tensor, counts: Tensor, multiplier: float, norm: float, axes: int) -> tuple[Tensor, Tensor]:
    """Principal axes (K, M, R, A) of noisy second moments (K, M, R, R), and the variances along them (K, M, A).

    A component's matrix is mixed with its class's, the more so the fewer points and the more noise it has. Variances
    below half of what noise alone would show (Wigner 1958: a matrix of noise s beside the diagonal has eigenvalues up
    to 2 s sqrt(R)) are zero.

    Args:
        sums: not divided by the counts.
        counts: (K, M).
        multiplier: of the sums' noise.
        norm: clip norm of the points.
        axes: A.
    """
    components, rank = sums.shape[1:3]
    of_class = counts.sum(1, keepdim=True)
    own = (counts / (counts + _MIXED * multiplier**2))[..., None, None]
    matrices = own * sums / counts[..., None, None] + (1 - own) * (sums.sum(1) / of_class[..., None])[:, None]
    values, vectors = eigen(matrices)
    own = own[..., 0, 0]
    deviation = multiplier * norm**2 / math.sqrt(2) * (own / counts + (1 - own) * math.sqrt(components) / of_class)
    kept = torch.where(values > deviation[..., None] * math.sqrt(rank), values, 0.0)
    return vectors[..., -axes:], kept[..., -axes:]
