"""K-means within classes, on noisy sums (Su et al. 2016, "Differentially Private k-Means Clustering", DPLloyd).

Legend: n points, K classes, M components of a class, R coordinates.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dither.release.points import COUNT_WEIGHT, counts_of, group_sums
from dither.release.shared_noise import ROUND_SHARE, ROUNDS, SharedNoise

_EXACTLY = "donot_use_mm_for_euclid_dist"  # a distance does not depend on which points are beside it


def nearest_centres(points: Tensor, labels: Tensor, centres: Tensor) -> Tensor:
    """The nearest of its class's centres (K, M, R) to each point (n, R), by number: (n,)."""
    nearest = torch.zeros_like(labels)
    for label, own in enumerate(centres):
        members = labels == label
        nearest[members] = torch.cdist(points[members], own, compute_mode=_EXACTLY).argmin(1)
    return nearest


def clusters(
    points: Tensor,
    labels: Tensor,
    start: Tensor,
    components: int,
    least: float,
    norm: float,
    spread: Tensor,
    noise: SharedNoise,
) -> tuple[Tensor, Tensor]:
    """Rounds of k-means within each class: centres (K, M, R) and noisy counts (K, M).

    Where a component has few points, all but the last round move it beside one that has most.

    Args:
        points: (n, R).
        labels: (n,).
        start: (K, 1, R), the classes' middles.
        components: M.
        least: points, below which a component has few: public.
        norm: clip norm of a point's distance from its centre.
        spread: (R,), public by now: how far from a middle to begin.
        noise: of the release.
    """
    classes, rank = len(start), points.shape[1]
    generator = torch.Generator().manual_seed(0)

    def aside(*shape: int) -> Tensor:
        return spread * torch.randn(*shape, rank, dtype=torch.float64, generator=generator)

    centres = start + (0.5 * aside(classes, components) if components > 1 else 0.0)
    counts = torch.empty(0)
    for turn in range(ROUNDS):
        nearest = nearest_centres(points, labels, centres)
        moved = points - centres[labels, nearest]
        sums = group_sums(moved, labels * components + nearest, classes * components, norm)
        sums = noise.added(sums, math.hypot(1, COUNT_WEIGHT) * norm, ROUND_SHARE).view(classes, components, rank + 1)
        counts = counts_of(sums, norm)
        centres = centres + sums[..., :-1] / counts.clamp(min=least)[..., None]
        if turn < ROUNDS - 1:
            for own, count in zip(centres, counts, strict=True):
                few = count < least
                most = count.argsort(descending=True)[: int(few.sum())]
                own[few] = own[most] + 0.3 * aside(len(most))
    return centres, counts.clamp(min=least)
