"""From images of any size to (channels, image_size, image_size), each by itself and by public constants only.

Nothing here is computed from more than one image, so preparing the data changes no privacy claim: no mean, no standard
deviation, no histogram.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from dither.errors import ConfigurationError, DataError

Resize = Literal["bicubic", "bilinear", "nearest", "none"]

_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, section 2.5.1
_BYTE_MAX = 255


@dataclass(frozen=True)
class Preparation:
    """How an image is brought to the size and channels that the model takes. Public choices.

    Args:
        image_size: side in pixels; None keeps the images' own, which must be one size and square.
        channels: 1 (grey) or 3 (RGB); None keeps the images' own, which must be of one kind.
        resize: interpolation, with antialiasing except for nearest; "none" only cuts.
        crop: cut the centred square before resizing; False stretches what is not square.

    Raises:
        ConfigurationError: a value that cannot work.
    """

    image_size: int | None = None
    channels: int | None = None
    resize: Resize = "bicubic"
    crop: bool = True

    def __post_init__(self) -> None:
        if self.image_size is not None and self.image_size < 1:
            raise ConfigurationError(f"image_size {self.image_size} is below 1", fix="give the side in pixels, e.g. 32")
        if self.channels not in (None, 1, 3):
            raise ConfigurationError(f"channels {self.channels} is neither 1 nor 3", fix="1 is grey, 3 is RGB")
        if self.resize not in get_args(Resize):
            raise ConfigurationError(
                f"resize {self.resize!r} is not known", fix=f"choose one of {', '.join(get_args(Resize))}"
            )

    def __call__(self, images: Tensor) -> Tensor:
        """Bring images to size and channels.

        Args:
            images: (..., C, H, W), uint8 in 0..255 or floating point in [-1, 1]; C is 1 or 3.

        Returns:
            (..., channels, image_size, image_size), of the same type and range.

        Raises:
            DataError: the images cannot be brought to this size; the message is about one image.
        """
        return self._fit(to_channels(images, self.channels or images.shape[-3]))

    def _fit(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        size = self.image_size
        if size is None or (height, width) == (size, size):
            return images
        if self.resize == "none":
            if min(height, width) < size:
                raise DataError(
                    f"{height} x {width} pixels are too few to cut {size} x {size} from", fix="allow resizing"
                )
            return _centre(images, size)
        if self.crop and height != width:
            images = _centre(images, min(height, width))
        mode = "nearest-exact" if self.resize == "nearest" else self.resize
        flat = images.reshape(-1, *images.shape[-3:])
        resized = F.interpolate(flat, (size, size), mode=mode, antialias=mode != "nearest-exact")
        if resized.is_floating_point():
            resized = resized.clamp(-1, 1)  # bicubic overshoots
        return resized.reshape(*images.shape[:-2], size, size)


def to_channels(images: Tensor, channels: int) -> Tensor:
    """Grey to RGB by repeating, RGB to grey by ITU-R BT.601 luma.

    Args:
        images: (..., C, H, W), C is 1 or 3, or `channels`.
        channels: 1 or 3.
    """
    found = images.shape[-3]
    if found == channels:
        return images
    if found == 1:
        return images.expand(*images.shape[:-3], channels, *images.shape[-2:])
    weights = torch.tensor(_LUMA).view(3, 1, 1)
    grey = (images * weights).sum(-3, keepdim=True)
    return grey if images.is_floating_point() else grey.round().to(images.dtype)


def normalised(images: Tensor) -> Tensor:
    """Pixels as float32 in [-1, 1]: 0 is -1 and 255 is 1; what is floating point is in that range already."""
    return images.float() if images.is_floating_point() else images.float() / (_BYTE_MAX / 2) - 1


def _centre(images: Tensor, size: int) -> Tensor:
    top, left = ((length - size) // 2 for length in images.shape[-2:])
    return images[..., top : top + size, left : left + size]
