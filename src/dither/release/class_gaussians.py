"""A noisy Gaussian of each class: means and covariances, released once, for a model to begin with.

Images drawn from it are post-processing, so a model may be trained on any number of them at no cost; what noisy
gradients then have left to learn is what a Gaussian lacks. Covariances are noised as in Dwork et al. 2014, "Analyze
Gauss: Optimal Bounds for Privacy-Preserving Principal Component Analysis", algorithm 1; the idea of a released
beginning is DP-FETA's (`dither.release.class_means`).

Legend: K classes, D entries of an image, R directions.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dither.accounting import CLASS_GAUSSIANS, Event, Ledger
from dither.errors import ConfigurationError
from dither.noise import _CLASS_GAUSSIANS, GaussianNoise, derived_seed
from dither.release.covariances import eigen
from dither.release.file import Release
from dither.release.points import COUNT_WEIGHT
from dither.release.reading import (
    LEAST_SHARE,
    check_counts,
    check_norms,
    clipped_distances,
    image_shape,
    usual_clip_norm,
)
from dither.sampling import CollateFunction, check_dataset

_MOST_ENTRIES = 4096  # of an image: its second moments are D x D
_PARTS = 3  # means, the common directions, covariances


@dataclass(frozen=True)
class ClassGaussians(Release):
    """What was released.

    Attributes:
        means: (K, ...) float32, in the images' unit.
        directions: (R, ...) float32, orthonormal.
        factors: (K, R, R) float32; a class's covariance along the directions is its factor times the transpose.
        events: as `Release`.
        private: as `Release`.
    """

    means: Tensor
    directions: Tensor
    factors: Tensor
    events: tuple[Event, ...]
    private: bool = True

    def draw(self, labels: Tensor, limits: tuple[float, float] | None = None) -> Tensor:
        """An image (N, ...) of each label (N,), cut to the limits; torch's global generator."""
        normals = torch.randn(len(labels), len(self.directions), 1)
        along = (self.factors[labels] @ normals).squeeze(2)
        images: Tensor = self.means[labels] + torch.tensordot(along, self.directions, 1)
        return images if limits is None else images.clamp(*limits)


def release_class_gaussians(
    dataset: Any,
    *,
    num_classes: int,
    noise_multiplier: float,
    rank: int = 60,
    clip_norm: float | None = None,
    centre: float = 0.0,
    collate_fn: CollateFunction | None = None,
    seed: int | None = None,
) -> ClassGaussians:
    """Release the mean and covariance of each class's clipped images, along the directions in which all vary most.

    Three releases, each with fresh noise: the sums and counts of each class; the second moments of all images about
    their class's noisy mean, of which the leading eigenvectors are the directions; the second moments of each class
    along these. Each image's distance from `centre`, and then from its class's noisy mean, is scaled down to
    `clip_norm`.

    Guarantee: under adding or removing one example, image and label alike, each is a Gaussian mechanism of
    `noise_multiplier` times its sensitivity: sqrt(1 + 1/4) clip_norm for sums with counts, and clip_norm^2 for second
    moments, the Frobenius norm of an outer product. Later releases use the data and earlier releases, so they compose
    adaptively; `events` says so to a ledger. What is computed from them is post-processing. The numbers of examples and
    of classes are taken as public. A seed voids the guarantee.

    Args:
        dataset: map-style; an example is an image (any shape, the same for all) and a label in 0..num_classes-1.
        num_classes: public.
        noise_multiplier: of each of the three releases.
        rank: R, at most D. More directions hold more of the images and more noise.
        clip_norm: in the images' unit; a public guess. None: 0.6 sqrt(D), for images in [-1, 1].
        centre: value of an empty pixel, which the noise then leaves out of the sums: -1 for light on dark.
        collate_fn: list of examples to batch; torch's default_collate if None.
        seed: None for fresh entropy; an integer repeats the noise: for tests, not private.

    Raises:
        ConfigurationError: an argument cannot work, or images of more than 4,096 entries.
        LabelError: a label is outside 0..num_classes-1; nothing was released.
        EmptyDatasetError: the dataset has no examples.
    """
    size = check_dataset(dataset)
    shape = image_shape(dataset, collate_fn)
    entries = math.prod(shape)
    clip = usual_clip_norm(entries) if clip_norm is None else clip_norm
    check_counts(num_classes=num_classes)
    check_norms(clip_norm=clip)
    _check(rank, entries)
    events = Ledger([Event(1.0, noise_multiplier, _PARTS, CLASS_GAUSSIANS, private=seed is None)]).events
    noise = GaussianNoise(derived_seed(seed, _CLASS_GAUSSIANS))

    def about(middles: Tensor) -> _Batches:
        return clipped_distances(dataset, np.arange(size), middles, clip, collate_fn)

    weight = COUNT_WEIGHT * clip
    sums = _sums(about(torch.full((num_classes, 1), centre, dtype=torch.float64)), num_classes, entries, weight)
    noise.add_([sums], noise_multiplier * math.hypot(clip, weight), step=0)
    counts = (sums[:, -1] / weight).clamp(min=LEAST_SHARE * size / num_classes)
    means = centre + sums[:, :-1] / counts[:, None]

    moments = _moments(about(means), entries)
    noise.add_([moments], noise_multiplier * clip**2, step=1)
    directions = eigen(moments)[1][:, -rank:]

    covariances = _class_moments(about(means), directions, num_classes)
    noise.add_([covariances], noise_multiplier * clip**2, step=2)
    factors = _factors(covariances / counts[:, None, None], noise_multiplier * clip**2 / counts)
    return ClassGaussians(
        means.float().view(num_classes, *shape),
        directions.T.float().reshape(rank, *shape),
        factors.float(),
        events,
        private=seed is None,
    )


_Batches = Iterable[tuple[Tensor, Tensor]]


def _sums(batches: _Batches, num_classes: int, entries: int, weight: float) -> Tensor:
    """Each class's sum of distances and, last, its number of examples times `weight`: (K, D + 1)."""
    sums = torch.zeros(num_classes, entries + 1, dtype=torch.float64)
    for distances, labels in batches:
        sums.index_add_(0, labels, F.pad(distances, (0, 1), value=weight))
    return sums


def _moments(batches: _Batches, entries: int) -> Tensor:
    """The sum of all outer products, (D, D)."""
    moments = torch.zeros(entries, entries, dtype=torch.float64)
    for distances, _ in batches:
        moments.addmm_(distances.T, distances)
    return moments


def _class_moments(batches: _Batches, directions: Tensor, num_classes: int) -> Tensor:
    """Each class's sum of outer products along the directions (D, R): (K, R, R)."""
    moments = torch.zeros(num_classes, directions.shape[1], directions.shape[1], dtype=torch.float64)
    for distances, labels in batches:
        along = distances @ directions
        for label in range(num_classes):
            own = along[labels == label]
            moments[label].addmm_(own.T, own)
    return moments


def _factors(covariances: Tensor, deviations: Tensor) -> Tensor:
    """Square roots of noisy matrices (K, R, R), without the directions that noise alone explains.

    A symmetric matrix of independent noise has its eigenvalues within a half-circle of radius 2 s sqrt(R), s the
    deviation of an entry beside the diagonal (Wigner 1958): what is below that is left out.

    Args:
        covariances: not yet symmetric.
        deviations: of their entries' noise, (K,).
    """
    values, vectors = eigen(covariances)
    edge = 2 * deviations / math.sqrt(2) * math.sqrt(covariances.shape[-1])
    kept = torch.where(values > edge[:, None], values, 0.0)
    factors: Tensor = vectors * kept.sqrt()[:, None, :]
    return factors


def _check(rank: int, entries: int) -> None:
    if entries > _MOST_ENTRIES:
        raise ConfigurationError(
            f"images of {entries} entries have too many second moments.",
            fix=f"class means, mixtures, or smaller images or latents: at most {_MOST_ENTRIES} entries",
        )
    if not 1 <= rank <= entries:
        raise ConfigurationError(f"rank must be from 1 to {entries}, an image's entries; it is {rank}.", fix="60")
