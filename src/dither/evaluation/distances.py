"""Distances of two sets of features: how near generated images are to real ones, as a set.

Legend: N generated and M real images, d features of each.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_SUBSETS = 20
_SUBSET_SIZE = 1000
_NEIGHBOURS = 3


def frechet_distance(generated: Tensor, real: Tensor) -> float:
    """Frechet distance of Gaussians fitted to features (N, d) and (M, d); on Inception's it is FID.

    |mean difference|^2 + trace(A + B - 2 (A B)^(1/2)) of the covariances (Heusel et al. 2017, arXiv:1706.08500,
    section 2). The root's trace is the sum of the roots of the eigenvalues of A^(1/2) B A^(1/2).
    """
    (mean, a), (other, b) = (_moments(part) for part in (generated, real))
    values, vectors = torch.linalg.eigh(a)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ b @ root).clamp_min(0).sqrt().sum()
    return max(0.0, float((mean - other).square().sum() + a.trace() + b.trace() - 2 * cross))


def _moments(features: Tensor) -> tuple[Tensor, Tensor]:
    return features.double().mean(0), torch.cov(features.double().T)


def kernel_distance(generated: Tensor, real: Tensor, *, seed: int = 0) -> tuple[float, float]:
    """Squared maximum mean discrepancy under (x.y / d + 1)^3; on Inception's features it is KID.

    The unbiased estimate on subsets of up to 1,000 of each (Binkowski et al. 2018, arXiv:1801.01401, section 4): it may
    be negative where the sets are alike.

    Returns:
        Mean over 20 pairs of subsets, and the standard error of that mean.
    """
    generator = torch.Generator().manual_seed(seed)
    size = min(_SUBSET_SIZE, len(generated), len(real))
    found = []
    for _ in range(_SUBSETS):
        x, y = (part[torch.randperm(len(part), generator=generator)[:size]].double() for part in (generated, real))
        within = sum((kernel.sum() - kernel.trace()) / (size * (size - 1)) for kernel in (_kernel(x, x), _kernel(y, y)))
        found.append(float(within - 2 * _kernel(x, y).mean()))
    values = torch.tensor(found, dtype=torch.float64)
    return float(values.mean()), float(values.std() / math.sqrt(_SUBSETS))


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def precision_recall(generated: Tensor, real: Tensor) -> tuple[float, float]:
    """Shares of each set within the other's reach (Kynkaanniemi et al. 2019, arXiv:1904.06991, section 2).

    A set reaches as far from each of its members as that member's third nearest neighbour in it.

    Returns:
        Precision: the share of generated features (N, d) that the real ones (M, d) reach; recall: the reverse.
    """
    return _reached(generated, real), _reached(real, generated)


def _reached(points: Tensor, by: Tensor) -> float:
    neighbours = min(_NEIGHBOURS + 1, len(by))  # each is its own nearest
    radii = torch.cat([torch.cdist(part, by).kthvalue(neighbours, dim=1).values for part in by.split(512)])
    hits = torch.cat([(torch.cdist(part, by) <= radii).any(1) for part in points.split(512)])
    return float(hits.double().mean())
