"""A labelled set of images (or latents) that training and evaluation index."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset

from dither.data.preparation import normalised


class Pixels(Protocol):
    """Prepared images, held in memory or decoded when asked for."""

    def __len__(self) -> int:
        """Number of images."""
        ...

    def take(self, indices: Tensor) -> Tensor:
        """Images (b, C, H, W) at indices (b,), float32."""
        ...


@dataclass(frozen=True)
class Held:
    """Images in memory.

    Args:
        images: (N, C, H, W), uint8 in 0..255, or floating point and then handed out as it is.
    """

    images: Tensor

    def __len__(self) -> int:
        """Number of images."""
        return len(self.images)

    def take(self, indices: Tensor) -> Tensor:
        """Images (b, C, H, W) at indices (b,), float32."""
        return normalised(self.images[indices])


@dataclass(frozen=True)
class Latents:
    """Where latents come from, so that samples can be decoded. Public facts of the autoencoder.

    Args:
        vae: folder or name of the autoencoder.
        scaling_factor: latents are handed out as (encoded - shift_factor) * scaling_factor.
        shift_factor: subtracted before scaling.
    """

    vae: str
    scaling_factor: float
    shift_factor: float = 0.0


class ImageData(Dataset[tuple[Tensor, Tensor]]):
    """Labelled images, map-style: each example is (image (C, H, W) float32 in [-1, 1], label () int64).

    The example is the unit of privacy. Pixels, labels and their histogram are private; `name`, `class_names`,
    `image_size`, `channels` and the number of examples are taken as public, and nothing else of the data is used to
    set a run up.

    Args:
        pixels: the prepared images.
        labels: (N,) int64 in 0..num_classes - 1.
        name: of the data set.
        class_names: one for each label, in the labels' order.
        image_size: side in pixels.
        channels: 1 or 3; for latents the autoencoder's.
        latents: where the examples come from if they are latents; they are then not bound to [-1, 1].
        left_out: examples and files that were left out, each with the reason. Not private.
    """

    def __init__(
        self,
        pixels: Pixels,
        labels: Tensor,
        *,
        name: str,
        class_names: Sequence[str],
        image_size: int,
        channels: int,
        latents: Latents | None = None,
        left_out: Sequence[str] = (),
    ) -> None:
        assert len(pixels) == len(labels)
        self.pixels, self.labels = pixels, labels
        self.name, self.class_names = name, tuple(class_names)
        self.image_size, self.channels = image_size, channels
        self.latents, self.left_out = latents, tuple(left_out)

    @property
    def num_classes(self) -> int:
        """Size of the public label set, whether or not every class has examples."""
        return len(self.class_names)

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """The example at an index."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        images, labels = self.batch([index % len(self)])
        return images[0], labels[0]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        """The examples at these indices; what torch's loaders ask for."""
        images, labels = self.batch(indices)
        return list(zip(images, labels, strict=True))

    def batch(self, indices: Sequence[int] | Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Examples as one batch.

        Args:
            indices: (b,); None for all, which has them all in memory.

        Returns:
            Images (b, C, H, W) float32 and labels (b,) int64.
        """
        chosen = torch.arange(len(self)) if indices is None else torch.as_tensor(indices, dtype=torch.int64)
        return self.pixels.take(chosen), self.labels[chosen]
