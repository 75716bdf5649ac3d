"""Noisy class means: one release of the Gaussian mechanism, for a model to begin with.

A model that was first trained on them, which is post-processing and costs nothing, has less left to learn from noisy
gradients. Source: Li et al. 2025, "From Easy to Hard: Building a Shortcut for Differentially Private Image Synthesis"
(DP-FETA), which calls them central images.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dither.accounting import CLASS_MEANS, Event, Ledger
from dither.errors import ConfigurationError
from dither.noise import _CLASS_MEANS, GaussianNoise, derived_seed
from dither.release.file import Release
from dither.release.reading import LEAST_SHARE, check_counts, check_norms, clipped_distances, image_shape
from dither.sampling import CollateFunction, PoissonSampler, check_dataset


@dataclass(frozen=True)
class ClassMeans(Release):
    """What was released.

    Attributes:
        images: (draws * num_classes, ...) float32, draw by draw, a noisy mean per class.
        labels: (draws * num_classes,) int64.
        events: as `Release`.
        private: as `Release`.
    """

    images: Tensor
    labels: Tensor
    events: tuple[Event, ...]
    private: bool = True


def release_class_means(
    dataset: Any,
    *,
    num_classes: int,
    noise_multiplier: float,
    clip_norm: float,
    draws: int = 1,
    sample_rate: float = 1.0,
    centre: float = 0.0,
    count_weight: float | None = None,
    limits: tuple[float, float] | None = None,
    collate_fn: CollateFunction | None = None,
    seed: int | None = None,
) -> ClassMeans:
    """Release noisy means of each class, of clipped images.

    In each draw an example joins with probability `sample_rate`; its distance from `centre` is scaled down to
    `clip_norm` and added to its class's sum, and Gaussian noise is added once to the sums of all classes.

    Guarantee: under adding or removing one example, image and label alike, a draw is the Poisson-sampled Gaussian
    mechanism on the vector of all classes' sums: an example is in one class's sum alone, so the vector moves by at most
    the sensitivity, which is `clip_norm`, or sqrt(clip_norm^2 + count_weight^2) where counts are released too. The
    standard deviation is `noise_multiplier` times that. `events` says so to a ledger, for all draws together. What is
    computed from the sums afterwards is post-processing. The number of examples and of classes are taken as public. A
    seed voids the guarantee.

    Args:
        dataset: map-style; an example is an image (any shape, the same for all) and a label in 0..num_classes-1.
        num_classes: public.
        noise_multiplier: noise standard deviation over the sensitivity.
        clip_norm: L2 bound on an image's distance from `centre`; a public guess, in the images' unit.
        draws: means of each class, each from a Poisson sample of its own.
        sample_rate: probability of an example to be in a draw.
        centre: value of an empty pixel, which the noise then leaves out of the sums: -1 for light on dark.
        count_weight: None divides by the public constant n * sample_rate / num_classes, right where classes are about
            equally frequent. A number adds a coordinate of that length to each example, in the image's unit: the noisy
            counts then divide, no less than a tenth of that constant.
        limits: bounds that the means are cut to; None leaves them.
        collate_fn: list of examples to batch; torch's default_collate if None.
        seed: None for fresh entropy; an integer repeats draws and noise: for tests, not private.

    Raises:
        ConfigurationError: an argument cannot work.
        LabelError: a label is outside 0..num_classes-1; nothing was released.
        EmptyDatasetError: the dataset has no examples.
    """
    size = check_dataset(dataset)
    check_counts(num_classes=num_classes, draws=draws)
    check_norms(clip_norm=clip_norm, **({} if count_weight is None else {"count_weight": count_weight}))
    if not 0.0 < sample_rate <= 1.0:
        raise ConfigurationError(f"sample_rate must be above 0 and at most 1; it is {sample_rate}.", fix="1")
    event = Event(sample_rate, noise_multiplier, draws, CLASS_MEANS, private=seed is None)
    events = Ledger([event]).events  # refuses what no ledger takes
    own = derived_seed(seed, _CLASS_MEANS)
    sampler, noise = PoissonSampler(size, sample_rate * size, seed=own), GaussianNoise(own)
    weight = 0.0 if count_weight is None else count_weight
    deviation = noise_multiplier * math.hypot(clip_norm, weight)
    expected = sample_rate * size / num_classes
    means = []
    for index in range(draws):
        sums, counts = _sums(dataset, sampler.draw(index), num_classes, clip_norm, centre, collate_fn)
        noisy = {"sums": sums, "counts": counts * weight} if weight else {"sums": sums}
        noise.add_(noisy, deviation, step=index)
        divisor = (
            (noisy["counts"] / weight).clamp(min=LEAST_SHARE * expected) if weight else counts.new_tensor(expected)
        )
        mean = centre + sums / divisor.view(-1, *[1] * (sums.dim() - 1))
        means.append(mean if limits is None else mean.clamp(*limits))
    labels = torch.arange(num_classes).repeat(draws)
    return ClassMeans(torch.cat(means).float(), labels, events, private=seed is None)


def _sums(
    dataset: Any, indices: np.ndarray[Any, Any], classes: int, clip_norm: float, centre: float, collate: Any
) -> tuple[Tensor, Tensor]:
    """Sums of clipped images (classes, ...) and numbers of examples (classes,), both float64; no noise in them yet."""
    shape = image_shape(dataset, collate)
    sums = torch.zeros(classes, math.prod(shape), dtype=torch.float64)
    counts = torch.zeros(classes, dtype=torch.float64)
    middles = torch.full((classes, 1), centre, dtype=torch.float64)
    for moved, labels in clipped_distances(dataset, indices, middles, clip_norm, collate):
        sums.index_add_(0, labels, moved)
        counts.index_add_(0, labels, torch.ones(len(labels), dtype=torch.float64))
    return sums.view(classes, *shape), counts
