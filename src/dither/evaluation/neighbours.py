"""The nearest real image of each generated one: is any training image repeated?"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dither.errors import ConfigurationError

_QUANTILE = 0.001


@dataclass(frozen=True)
class Neighbours:
    """Distances in pixels of images to the training images nearest to them.

    Attributes:
        indices: (N,) of the nearest training image of each generated one.
        distances: (N,) to it.
        usual: (M,) distances of held-out real images to their nearest training images: what chance gives.
    """

    indices: Tensor
    distances: Tensor
    usual: Tensor

    @property
    def suspicious(self) -> Tensor:
        """Indices of generated images nearer to a training image than 999 of 1,000 held-out ones are, nearest first."""
        near = (self.distances < torch.quantile(self.usual, _QUANTILE)).nonzero().flatten()
        return near[self.distances[near].argsort()]


def nearest(generated: Tensor, training: Tensor, held_out: Tensor) -> Neighbours:
    """Find the nearest training image of each.

    Args:
        generated: (N, C, H, W).
        training: (M, C, H, W), what the model was trained on.
        held_out: (K, C, H, W), real images that it was not trained on.

    Raises:
        ConfigurationError: a set is empty.
    """
    if not (len(generated) and len(training) and len(held_out)):
        raise ConfigurationError("a set of images is empty", fix="give samples, training images and held-out images")
    indices, distances = _search(generated, training)
    return Neighbours(indices, distances, _search(held_out, training)[1])


def _search(images: Tensor, among: Tensor) -> tuple[Tensor, Tensor]:
    flat = among.flatten(1)
    found = [torch.cdist(part, flat).min(1) for part in images.flatten(1).split(256)]
    return torch.cat([part.indices for part in found]), torch.cat([part.values for part in found])
