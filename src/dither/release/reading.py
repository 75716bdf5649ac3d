"""What releases of class statistics read: images as clipped distances, labels that are checked."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dither.errors import ConfigurationError, LabelError
from dither.sampling import CollateFunction, load_batch

LEAST_SHARE = 0.1
"""Of the expected count of a class, below which a noisy count does not divide."""
_CHUNK, _ENTRIES = 1024, 1 << 22  # examples, and entries of them, read at once


def image_shape(dataset: Any, collate_fn: CollateFunction | None) -> torch.Size:
    """The shape of an image, which is public; the pixels are unused."""
    shape: torch.Size = load_batch(dataset, np.zeros(1, dtype=np.int64), collate_fn)[0].shape[1:]
    return shape


def clipped_distances(
    dataset: Any,
    indices: np.ndarray[Any, Any],
    middles: Tensor,
    clip_norm: float,
    collate_fn: CollateFunction | None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Distances of images from their class's middle, each scaled down to a norm of at most `clip_norm`, in chunks.

    Images that are not finite are left out, labels and all.

    Args:
        dataset: map-style; an example is an image of D entries and a label in 0..K-1.
        indices: of the examples to read.
        middles: (K, D) float64, or (K, 1).
        clip_norm: the bound.
        collate_fn: list of examples to batch; torch's default_collate if None.

    Returns:
        Distances (b, D) float64 and labels (b,), chunk by chunk.

    Raises:
        LabelError: a label is outside 0..K-1.
    """
    chunk = max(1, min(_CHUNK, _ENTRIES // math.prod(image_shape(dataset, collate_fn))))
    for start in range(0, len(indices), chunk):
        batch = load_batch(dataset, indices[start : start + chunk], collate_fn)
        images, labels = (part.detach().cpu() for part in batch[:2])
        check_labels(labels, len(middles))
        distances = images.double().flatten(1) - middles[labels]
        norms = distances.norm(dim=1)
        finite = norms.isfinite()
        factors = (clip_norm / norms[finite]).clamp(max=1.0)
        yield distances[finite] * factors[:, None], labels[finite]


def usual_clip_norm(entries: int) -> float:
    """A public guess of an image's distance from its middle, for pixels in [-1, 1]: 0.6 root of its entries."""
    return 0.6 * math.sqrt(entries)


def check_counts(**counts: int) -> None:
    """Refuse numbers of things, by name, of which there must be one at least.

    Raises:
        ConfigurationError: one is below 1.
    """
    for name, count in counts.items():
        if count < 1:
            raise ConfigurationError(f"{name} must be at least 1; it is {count}.", fix=f"{name}=1 or more")


def check_norms(**norms: float) -> None:
    """Refuse lengths, by name, in the images' unit.

    Raises:
        ConfigurationError: one is not positive and finite.
    """
    for name, norm in norms.items():
        if not 0.0 < norm < math.inf:
            raise ConfigurationError(
                f"{name} must be positive and finite; it is {norm}.", fix="about half of an image's norm"
            )


def check_labels(labels: Tensor, num_classes: int) -> None:
    """Refuse labels outside the public set.

    Raises:
        LabelError: one is outside 0..num_classes-1.
    """
    low, high = (int(bound) for bound in torch.aminmax(labels))
    if low < 0 or high >= num_classes:
        raise LabelError(
            f"label {low if low < 0 else high} is outside 0..{num_classes - 1}", fix="give the right num_classes"
        )
