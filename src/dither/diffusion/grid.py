"""Write sampled images as one picture: a row per class, its label in front."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from dither.diffusion.export import to_pixels
from dither.errors import OutputPathError

if TYPE_CHECKING:
    from PIL.Image import Image

_GAP = 2  # pixels between images
_SHORTEST_SIDE = 48  # smaller images are enlarged to about this, by whole pixels
_MARGIN = 64  # room for the label


def image_grid(images: Tensor, labels: Tensor) -> Image:
    """Lay images out, one row per class in ascending order, the class id in front of its row.

    Small images are enlarged by repeating pixels, so that 8 x 8 digits are readable.

    Args:
        images: (N, C, H, W) in [-1, 1]; C is 1 (grey) or 3 (RGB), otherwise the first channel is shown.
        labels: (N,) int64.

    Returns:
        A Pillow RGB image.
    """
    from PIL import Image, ImageDraw

    images = images.detach().float().cpu()
    labels = labels.detach().cpu()
    images = images if images.shape[1] == 3 else images[:, :1].expand(-1, 3, -1, -1)
    scale = max(1, _SHORTEST_SIDE // max(1, min(images.shape[-2:])))
    images = F.interpolate(images, scale_factor=scale, mode="nearest") if len(images) else images
    pixels = to_pixels(images)
    height, width = pixels.shape[-2] + _GAP, pixels.shape[-1] + _GAP
    classes = sorted(set(labels.tolist()))
    longest = max((int((labels == label).sum()) for label in classes), default=0)
    canvas = Image.new("RGB", (_MARGIN + longest * width + _GAP, len(classes) * height + _GAP), "white")
    pen = ImageDraw.Draw(canvas)
    for row, label in enumerate(classes):
        top = _GAP + row * height
        pen.text((8, top + height // 2 - 6), str(label), fill="black")
        for column, picture in enumerate(pixels[labels == label]):
            tile = Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy())
            canvas.paste(tile, (_MARGIN + column * width, top))
    return canvas


def save_grid(images: Tensor, labels: Tensor, path: str | os.PathLike[str]) -> Path:
    """Write `image_grid(images, labels)` to a file (PNG by its name) and return the path.

    Raises:
        OutputPathError: the file cannot be written.
    """
    target = Path(path)
    try:
        image_grid(images, labels).save(target)
    except (OSError, ValueError) as error:
        raise OutputPathError(
            f"cannot write {target}: {error}", fix="choose a writable path that ends in .png"
        ) from error
    return target


def first_of_each(labels: Tensor, count: int) -> Tensor:
    """Where the first `count` images of each class stand in labels (N,): indices in ascending order."""
    places = [torch.nonzero(labels == label).flatten()[:count] for label in labels.unique()]
    return torch.cat(places).sort().values if places else labels.new_empty(0)
