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
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dither.accounting import CLASS_MIXTURES, Event, Ledger
from dither.noise import _CLASS_MIXTURES, derived_seed
from dither.release.clusters import clusters
from dither.release.covariances import LEFT_WEIGHT, eigen, principal_axes, second_moments, variances_of_the_rest
from dither.release.file import Release
from dither.release.frequencies import low_frequencies
from dither.release.points import COUNT_WEIGHT, counts_of, group_sums, moments, squared_lengths, total
from dither.release.reading import (
    LEAST_SHARE,
    check_counts,
    check_norms,
    clipped_distances,
    image_shape,
    usual_clip_norm,
)
from dither.release.shared_noise import CLASSES_SHARE, COVARIANCES_SHARE, DIRECTIONS_SHARE, MIDDLE_SHARE, SharedNoise
from dither.sampling import CollateFunction, check_dataset

_AXES = 24  # most principal axes of a component
_FREQUENCIES = 200
_FARTHEST = 4.0  # distance of an image from the centre, in clip norms, beyond which it is moved nearer first
_NEAR = 0.36  # clip norm of distances within a component, and of those that directions are found from, of clip_norm
_LEAST_VARIANCE = 1e-3
_LEAST_SPREAD = 0.02  # of where components begin, in clip norms


@dataclass(frozen=True)
class ClassMixtures(Release):
    """What was released.

    Attributes:
        middle: (...) float32, in the images' unit; where coordinates along the directions are zero.
        directions: (R, ...) float32, orthonormal.
        weights: (K, M), shares of a class's components.
        centres: (K, M, R), along the directions.
        axes: (K, M, R, A), orthonormal columns.
        variances: (K, M, A), along the axes.
        rest: (2,): the variance along a direction outside a component's axes, and along one outside of all directions.
        events: as `Release`.
        private: as `Release`.
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

    def draw(self, labels: Tensor, limits: tuple[float, float] | None = None) -> Tensor:
        """An image (N, ...) of each label (N,) along its component's axes, cut to the limits; torch's generator."""
        which = torch.multinomial(self.weights[labels], 1).squeeze(1)
        along = self.variances[labels, which].clamp(min=0).sqrt() * torch.randn(len(labels), self.variances.shape[-1])
        points = self.centres[labels, which] + (self.axes[labels, which] @ along.unsqueeze(2)).squeeze(2)
        images: Tensor = self.middle + torch.tensordot(points, self.directions, 1)
        return images if limits is None else images.clamp(*limits)


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
    events = Ledger([Event(1.0, noise_multiplier, 1, CLASS_MIXTURES, private=seed is None)]).events
    noise = SharedNoise(noise_multiplier, derived_seed(seed, _CLASS_MIXTURES))
    rank, number = release_sizes(entries, rank)
    near = _NEAR * clip

    frequencies = low_frequencies(shape, _FREQUENCIES)
    middles = torch.full((num_classes, 1), centre, dtype=torch.float64)
    read = clipped_distances(dataset, np.arange(size), middles, _FARTHEST * clip, collate_fn)
    points, labels, left = _along(read, frequencies)

    middle = noise.added(total(points, clip), clip, MIDDLE_SHARE) / size
    points -= middle
    values, vectors = eigen(noise.added(moments(points, near), near**2, DIRECTIONS_SHARE) / size)
    found, spread = vectors[:, -rank:], values[-rank:].clamp(min=(_LEAST_SPREAD * near) ** 2).sqrt() / _NEAR
    along = points @ found
    left += squared_lengths(points) - squared_lengths(along)
    del points

    sums = noise.added(group_sums(along, labels, num_classes, clip), math.hypot(1, COUNT_WEIGHT) * clip, CLASSES_SHARE)
    counts = counts_of(sums, clip).clamp(min=LEAST_SHARE * size / num_classes)
    start = sums[:, None, :-1] / counts[:, None, None]
    least = 0.2 * size / (num_classes * components)
    centres, counts = clusters(along, labels, start, components, least, near, spread, noise)

    matrices, outside = second_moments(along, left, labels, centres, near, noise)
    multiplier = noise.multiplier(COVARIANCES_SHARE)
    axes, variances = principal_axes(matrices, counts, multiplier, near, number)
    # What is said of the rest errs towards nothing, by the deviation of its noise.
    doubt = multiplier * near**2 * math.sqrt(num_classes * components) / LEFT_WEIGHT
    per_direction = float(outside.sum() - doubt) / float(counts.sum()) / (entries - rank) if entries > rank else 0.0
    rest = variances_of_the_rest(matrices, counts, variances, max(per_direction, _LEAST_VARIANCE))
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


def _along(batches: Any, frequencies: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Coordinates (n, L) of images, labels (n,), and what the frequencies leave of each image's square (n,)."""
    parts = [(images @ frequencies, labels, images.square().sum(1)) for images, labels in batches]
    points, labels, squares = (torch.cat(part) for part in zip(*parts, strict=True))
    return points, labels, squares - points.square().sum(1)
