"""A noisy mixture of Gaussians for each class, released once: a denoiser of it is where a model may begin.

A mixture's denoiser is known in closed form (`dither.diffusion.over_mixture`), so that noisy gradients have only what
it lacks left to learn. Components are found as in private k-means (Su et al. 2016, "Differentially Private k-Means
Clustering", DPLloyd), directions as in Dwork et al. 2014, "Analyze Gauss", algorithm 1, among the lowest frequencies:
images have most of their variance there, whichever they are, and noise has no more there than elsewhere.

Legend: n images of D entries, K classes, M components of a class, L frequencies, R directions, A axes of a component.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dither.accounting import CLASS_MIXTURES, Event, Ledger
from dither.errors import LedgerError
from dither.frequencies import low_frequencies
from dither.noise import _CLASS_MIXTURES, GaussianNoise, derived_seed
from dither.releases import (
    LEAST_SHARE,
    check_counts,
    check_norms,
    clipped_distances,
    image_shape,
    load_release,
    save_release,
    usual_clip_norm,
)
from dither.sampling import CollateFunction, check_dataset

_AXES = 24  # most principal axes of a component
_FREQUENCIES = 200
_ROUNDS = 3  # of k-means
# What each part has of the release's precision, 1 / noise_multiplier^2; all together have 1.
_MIDDLE, _DIRECTIONS, _CLASSES, _ROUND = 1 / 32, 1 / 32, 1 / 32, 1 / 8
_COVARIANCES = 1 - _MIDDLE - _DIRECTIONS - _CLASSES - _ROUNDS * _ROUND
_FARTHEST = 4.0  # distance of an image from the centre, in clip norms, beyond which it is moved nearer first
_NEAR = 0.36  # clip norm of distances within a component, and of those that directions are found from, of clip_norm
_COUNT_WEIGHT = 0.5  # of an example in its component's count, in units of the distance's clip norm
_LEFT_WEIGHT = 0.02  # of what directions leave of an image, in the covariances' sums
_LEFT_MOST = 4.0  # of that, in squares of the clip norm
_MIXED = (
    12.0  # points, times the square of the covariances' noise multiplier, below which their class's has more weight
)
_LEAST_VARIANCE = 1e-3
_LEAST_SPREAD = 0.02  # of where components begin, in clip norms
_CHUNK = 8192  # points summed at once
_EXACTLY = "donot_use_mm_for_euclid_dist"  # a distance does not depend on which points are beside it
_TENSORS = ("middle", "directions", "weights", "centres", "axes", "variances", "rest")


@dataclass(frozen=True)
class ClassMixtures:
    """What was released.

    Attributes:
        middle: (...) float32, in the images' unit; where coordinates along the directions are zero.
        directions: (R, ...) float32, orthonormal.
        weights: (K, M), shares of a class's components.
        centres: (K, M, R), along the directions.
        axes: (K, M, R, A), orthonormal columns.
        variances: (K, M, A), along the axes.
        rest: (2,): the variance along a direction outside a component's axes, and along one outside of all directions.
        events: what the release cost; hand them to `PrivateTraining(prior=...)`.
        private: whether the noise came from fresh entropy; a seed makes it predictable.
    """

    middle: Tensor
    directions: Tensor
    weights: Tensor
    centres: Tensor
    axes: Tensor
    variances: Tensor
    rest: Tensor
    events: tuple[Event, ...]
    private: bool = True

    def tensors(self) -> dict[str, Tensor]:
        """The released tensors, by name."""
        return {name: getattr(self, name) for name in _TENSORS}

    def draw(self, labels: Tensor, limits: tuple[float, float] | None = None) -> Tensor:
        """An image (N, ...) of each label (N,) along its component's axes, cut to the limits; torch's generator."""
        which = torch.multinomial(self.weights[labels], 1).squeeze(1)
        along = self.variances[labels, which].clamp(min=0).sqrt() * torch.randn(len(labels), self.variances.shape[-1])
        points = self.centres[labels, which] + (self.axes[labels, which] @ along.unsqueeze(2)).squeeze(2)
        images: Tensor = self.middle + torch.tensordot(points, self.directions, 1)
        return images if limits is None else images.clamp(*limits)

    def save(self, path: Path) -> None:
        """Write the release to a file that `load` reads; a crash leaves no half of it.

        Raises:
            LedgerError: a release is there already.
            OutputPathError: the file cannot be written.
        """
        save_release(path, self.tensors(), self.events, self.private)

    @classmethod
    def load(cls, path: Path) -> ClassMixtures:
        """Read what `save` wrote.

        Raises:
            RunFolderError: the file is missing or damaged.
        """
        tensors, events, private = load_release(path, _TENSORS)
        return cls(**dict(zip(_TENSORS, tensors, strict=True)), events=events, private=private)


def release_sizes(entries: int, rank: int) -> tuple[int, int]:
    """Directions R and axes A of a release from images of so many entries."""
    directions = min(rank, entries, _FREQUENCIES)
    return directions, min(directions, _AXES)


def release_class_mixtures(
    dataset: Any,
    *,
    num_classes: int,
    noise_multiplier: float,
    components: int = 20,
    rank: int = 60,
    clip_norm: float | None = None,
    centre: float = 0.0,
    collate_fn: CollateFunction | None = None,
    seed: int | None = None,
) -> ClassMixtures:
    """Release a mixture of Gaussians for each class's clipped images.

    Seven sums are noised, one after the other: all images; their second moments among the lowest frequencies, of which
    the leading eigenvectors are the directions; each class; three rounds of k-means within the classes; and each
    component's second moments. An image's distance from what it is compared with is scaled down to `clip_norm`, or to
    0.36 times that in second moments and within components.

    Guarantee: under adding or removing one example, image and label alike, each sum is noised by a Gaussian mechanism,
    with noise multipliers whose inverse squares add to `noise_multiplier` to the power of -2. Later sums use the data
    and earlier ones, and Gaussian mechanisms on all of the data compose adaptively as one does (Dong et al. 2019,
    "Gaussian Differential Privacy", corollary 3.3), so the release is one Gaussian mechanism of `noise_multiplier`;
    `events` says so to a ledger. What is computed from the sums is post-processing. The numbers of examples and of
    classes are taken as public. A seed voids the guarantee.

    Args:
        dataset: map-style; an example is an image (any shape, the same for all) and a label in 0..num_classes-1. Each
            image is read once; about 2 kB of it are held.
        num_classes: public.
        noise_multiplier: of the whole release.
        components: M. About one for each 300 images of a class, up to 20, has done well.
        rank: R, cut to D and 200. More directions hold more of the images and more noise.
        clip_norm: in the images' unit; a public guess. None: 0.6 sqrt(D), for images in [-1, 1].
        centre: value of an empty pixel, which the noise then leaves out of the sums: -1 for light on dark.
        collate_fn: list of examples to batch; torch's default_collate if None.
        seed: None for fresh entropy; an integer repeats the noise: for tests, not private.

    Raises:
        ConfigurationError: an argument cannot work.
        LabelError: a label is outside 0..num_classes-1; nothing was released.
        EmptyDatasetError: the dataset has no examples.
    """
    size = check_dataset(dataset)
    shape = image_shape(dataset, collate_fn)
    entries = math.prod(shape)
    clip = usual_clip_norm(entries) if clip_norm is None else clip_norm
    check_counts(num_classes=num_classes, components=components, rank=rank)
    check_norms(clip_norm=clip)
    events = Ledger([Event(1.0, noise_multiplier, 1, CLASS_MIXTURES)]).events
    noise = _Noise(noise_multiplier, derived_seed(seed, _CLASS_MIXTURES))
    rank, number = release_sizes(entries, rank)
    near = _NEAR * clip

    frequencies = low_frequencies(shape, _FREQUENCIES)
    middles = torch.full((num_classes, 1), centre, dtype=torch.float64)
    read = clipped_distances(dataset, np.arange(size), middles, _FARTHEST * clip, collate_fn)
    points, labels, left = _along(read, frequencies)

    middle = noise.added(_sum(points, clip), clip, _MIDDLE) / size
    points -= middle
    values, vectors = _eigen(noise.added(_moments(points, near), near**2, _DIRECTIONS) / size)
    found, spread = vectors[:, -rank:], values[-rank:].clamp(min=(_LEAST_SPREAD * near) ** 2).sqrt() / _NEAR
    along = points @ found
    left += _squares(points) - _squares(along)
    del points

    sums = noise.added(_sums(along, labels, num_classes, clip), math.hypot(1, _COUNT_WEIGHT) * clip, _CLASSES)
    counts = _counts(sums, clip).clamp(min=LEAST_SHARE * size / num_classes)
    start = sums[:, None, :-1] / counts[:, None, None]
    least = 0.2 * size / (num_classes * components)
    centres, counts = _clusters(along, labels, start, components, least, near, spread, noise)

    matrices, outside = _second_moments(along, left, labels, centres, near, noise)
    multiplier = noise.multiplier(_COVARIANCES)
    axes, variances = _principal(matrices, counts, multiplier, near, number)
    # What is said of the rest errs towards nothing, by the deviation of its noise.
    doubt = multiplier * near**2 * math.sqrt(num_classes * components) / _LEFT_WEIGHT
    per_direction = float(outside.sum() - doubt) / float(counts.sum()) / (entries - rank) if entries > rank else 0.0
    rest = _rest(matrices, counts, variances, max(per_direction, _LEAST_VARIANCE))
    back = frequencies.T
    return ClassMixtures(
        (centre + middle @ back).float().view(shape),
        (found.T @ back).float().view(rank, *shape),
        (counts / counts.sum(1, keepdim=True)).float(),
        centres.float(),
        axes.float(),
        variances.float(),
        rest.float(),
        events,
        private=seed is None,
    )


class _Noise:
    """Gives each part of a release its share of the precision, and noise of its own."""

    def __init__(self, noise_multiplier: float, seed: int | None) -> None:
        self._multiplier, self._source = noise_multiplier, GaussianNoise(seed)
        self._parts, self._shared = 0, 0.0

    def multiplier(self, share: float) -> float:
        """The noise multiplier of a part."""
        return self._multiplier / math.sqrt(share)

    def added(self, sums: Tensor, sensitivity: float, share: float) -> Tensor:
        """The sums, in place, with noise for what one example moves them by at most."""
        self._shared += share
        if self._shared > 1 + 1e-9:
            raise LedgerError("the parts of a release cost more than the whole.", fix="their shares must add to 1")
        self._source.add_([sums], self.multiplier(share) * sensitivity, step=self._parts)
        self._parts += 1
        return sums


def _along(batches: Any, frequencies: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Coordinates (n, L) of images, labels (n,), and what the frequencies leave of each image's square (n,)."""
    parts = [(images @ frequencies, labels, images.square().sum(1)) for images, labels in batches]
    points, labels, squares = (torch.cat(part) for part in zip(*parts, strict=True))
    return points, labels, squares - points.square().sum(1)


def _clipped(points: Tensor, norm: float) -> Tensor:
    clipped: Tensor = points * (norm / points.norm(dim=1, keepdim=True)).clamp(max=1.0)
    return clipped


def _squares(points: Tensor) -> Tensor:
    squares: Tensor = torch.linalg.vecdot(points, points)
    return squares


def _sum(points: Tensor, norm: float) -> Tensor:
    """The sum of clipped points (n, L): (L,)."""
    return torch.stack([_clipped(part, norm).sum(0) for part in points.split(_CHUNK)]).sum(0)


def _moments(points: Tensor, norm: float) -> Tensor:
    """The sum of outer products of clipped points (n, L): (L, L)."""
    moments = points.new_zeros(points.shape[1], points.shape[1])
    for part in points.split(_CHUNK):
        clipped = _clipped(part, norm)
        moments.addmm_(clipped.T, clipped)
    return moments


def _sums(points: Tensor, groups: Tensor, count: int, norm: float) -> Tensor:
    """Sums of clipped points (n, R) of each group, and last its number of points, weighed: (count, R + 1)."""
    sums = points.new_zeros(count, points.shape[1] + 1)
    return sums.index_add_(0, groups, F.pad(_clipped(points, norm), (0, 1), value=_COUNT_WEIGHT * norm))


def _counts(sums: Tensor, norm: float) -> Tensor:
    return sums[..., -1] / (_COUNT_WEIGHT * norm)


def _nearest(points: Tensor, labels: Tensor, centres: Tensor) -> Tensor:
    """The nearest of its class's centres (K, M, R) to each point (n, R), by number: (n,)."""
    nearest = torch.zeros_like(labels)
    for label, own in enumerate(centres):
        members = labels == label
        nearest[members] = torch.cdist(points[members], own, compute_mode=_EXACTLY).argmin(1)
    return nearest


def _clusters(
    points: Tensor,
    labels: Tensor,
    start: Tensor,
    components: int,
    least: float,
    norm: float,
    spread: Tensor,
    noise: _Noise,
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
    for turn in range(_ROUNDS):
        nearest = _nearest(points, labels, centres)
        moved = points - centres[labels, nearest]
        sums = _sums(moved, labels * components + nearest, classes * components, norm)
        sums = noise.added(sums, math.hypot(1, _COUNT_WEIGHT) * norm, _ROUND).view(classes, components, rank + 1)
        counts = _counts(sums, norm)
        centres = centres + sums[..., :-1] / counts.clamp(min=least)[..., None]
        if turn < _ROUNDS - 1:
            for own, count in zip(centres, counts, strict=True):
                few = count < least
                most = count.argsort(descending=True)[: int(few.sum())]
                own[few] = own[most] + 0.3 * aside(len(most))
    return centres, counts.clamp(min=least)


def _second_moments(
    points: Tensor, left: Tensor, labels: Tensor, centres: Tensor, norm: float, noise: _Noise
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
    nearest = _nearest(points, labels, centres)
    moved = points - centres[labels, nearest]
    sums = _covariances(moved, left, labels * components + nearest, classes * components, norm)
    sums = noise.added(sums, math.hypot(1, _LEFT_WEIGHT * _LEFT_MOST) * norm**2, _COVARIANCES)
    return sums[:, :-1].view(classes, components, rank, rank), sums[:, -1].view(classes, components) / _LEFT_WEIGHT


def _rest(matrices: Tensor, counts: Tensor, variances: Tensor, outside: float) -> Tensor:
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


def _covariances(points: Tensor, left: Tensor, groups: Tensor, count: int, norm: float) -> Tensor:
    """Second moments of clipped points (n, R) of each group, and last what directions left, weighed: (count, R^2 + 1).

    What an example adds is no longer than norm^2 sqrt(1 + (_LEFT_WEIGHT _LEFT_MOST)^2).
    """
    clipped = _clipped(points, norm)
    sums = points.new_zeros(count, points.shape[1] ** 2 + 1)
    for group in range(count):
        own = clipped[groups == group]
        sums[group, :-1] = (own.T @ own).flatten()
    capped = left.clamp(0, _LEFT_MOST * norm**2) * _LEFT_WEIGHT
    sums[:, -1].index_add_(0, groups, capped)
    return sums


def _eigen(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, rising, and vectors of noisy matrices, not yet symmetric."""
    values, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
    return values, vectors


def _principal(sums: Tensor, counts: Tensor, multiplier: float, norm: float, axes: int) -> tuple[Tensor, Tensor]:
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
    values, vectors = _eigen(matrices)
    own = own[..., 0, 0]
    deviation = multiplier * norm**2 / math.sqrt(2) * (own / counts + (1 - own) * math.sqrt(components) / of_class)
    kept = torch.where(values > deviation[..., None] * math.sqrt(rank), values, 0.0)
    return vectors[..., -axes:], kept[..., -axes:]
