"""One image file to pixels."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from dither.errors import reason_of

if TYPE_CHECKING:
    from PIL.Image import Image

_SIXTEEN_TO_EIGHT_BITS = 257  # 65535 / 255
_BACKGROUND = "white"  # a public constant, behind what is transparent
_GREY = ("1", "L", "LA", "La")
_NO_RANGE = ("I", "F")


class UnreadableImageError(ValueError):
    """An image cannot be decoded; the message is the reason."""


def decode(content: Path | bytes) -> Tensor:
    """Decode an image by itself, with no constants but public ones.

    The EXIF orientation is applied, transparency is laid on white, 16 bits become 8, of an animation the first picture
    is taken, and colour spaces other than RGB are converted by Pillow.

    Args:
        content: a file, or its bytes.

    Returns:
        (1, H, W) if the file is grey, else (3, H, W); uint8.

    Raises:
        UnreadableImageError: it is no image, truncated, or has no fixed range of values.
    """
    from PIL import Image, ImageOps

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(content) if isinstance(content, bytes) else content) as image:
                image.load()
                sixteen_bits = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG")
                return _pixels(ImageOps.exif_transpose(image), sixteen_bits)
    except UnreadableImageError:
        raise
    except Exception as error:  # Pillow's plugins raise what their parsers raise
        raise UnreadableImageError(_reason(error)) from error


def _pixels(image: Image, sixteen_bits: bool) -> Tensor:
    if sixteen_bits:
        values = np.asarray(image).astype(np.float32) / _SIXTEEN_TO_EIGHT_BITS
        return torch.from_numpy(values.round().clip(0, 255).astype(np.uint8))[None]
    if image.mode in _NO_RANGE:
        raise UnreadableImageError(f"values of mode {image.mode} have no fixed range")
    grey = image.mode in _GREY
    if image.has_transparency_data:
        image = _on_background(image)
    array = np.array(image.convert("L" if grey else "RGB"))
    return torch.from_numpy(array)[None] if grey else torch.from_numpy(array).permute(2, 0, 1).contiguous()


def _on_background(image: Image) -> Image:
    from PIL import Image as Pillow

    layer = image.convert("RGBA")
    return Pillow.alpha_composite(Pillow.new("RGBA", layer.size, _BACKGROUND), layer)


def _reason(error: Exception) -> str:
    from PIL import UnidentifiedImageError

    if isinstance(error, UnidentifiedImageError):
        return "no image that Pillow knows"
    return reason_of(error)
