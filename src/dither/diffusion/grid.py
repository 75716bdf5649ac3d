"""Write sampled images as one picture: a row per class, its name or number in front."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
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
_MARGIN = 64  # least room for the label
_LONGEST_NAME = 24  # letters


def image_grid(images: Tensor, labels: Tensor, class_names: Sequence[str] | None = None) -> Image:
    """Lay images out, one row per class in ascending order, its name in front of its row.

    Small images are enlarged by repeating pixels, so that 8 x 8 digits are readable.

    Args:
        images: (N, C, H, W) in [-1, 1]; C is 1 (grey) or 3 (RGB), otherwise the first channel is shown.
        labels: (N,) int64.
        class_names: by label; None, or none, shows their numbers. Long ones are cut; one in other letters than
            Latin ones is its number.

    Returns:
        A Pillow RGB image.
    """
    from PIL import Image, ImageDraw, ImageFont

    images = images.detach().float().cpu()
    labels = labels.detach().cpu()
    images = images if images.shape[1] == 3 else images[:, :1].expand(-1, 3, -1, -1)
    scale = max(1, _SHORTEST_SIDE // max(1, min(images.shape[-2:])))
    images = F.interpolate(images, scale_factor=scale, mode="nearest") if len(images) else images
    pixels = to_pixels(images)
    height, width = pixels.shape[-2] + _GAP, pixels.shape[-1] + _GAP
    classes = sorted(set(labels.tolist()))
    longest = max((int((labels == label).sum()) for label in classes), default=0)
    names = [_shown(label, class_names) for label in classes]
    font = ImageFont.load_default()
    margin = max([_MARGIN, *(16 + math.ceil(font.getlength(name)) for name in names)])
    canvas = Image.new("RGB", (margin + longest * width + _GAP, len(classes) * height + _GAP), "white")
    pen = ImageDraw.Draw(canvas)
    for row, (label, name) in enumerate(zip(classes, names, strict=True)):
        top = _GAP + row * height
        pen.text((8, top + height // 2 - 6), name, fill="black", font=font)
        for column, picture in enumerate(pixels[labels == label]):
            tile = Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy())
            canvas.paste(tile, (margin + column * width, top))
    return canvas


def _shown(label: int, class_names: Sequence[str] | None) -> str:
    name = class_names[label] if class_names else str(label)
    try:
        name.encode("latin-1")
    except UnicodeEncodeError:  # letters that Pillow's own font lacks
        return str(label)
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 3]}..."


def save_grid(
    images: Tensor, labels: Tensor, path: str | os.PathLike[str], class_names: Sequence[str] | None = None
) -> Path:
    """Write `image_grid(images, labels, class_names)` to a file (PNG by its name) and return the path.

    Raises:
        OutputPathError: the file cannot be written.
    """
    target = Path(path)
    try:
        image_grid(images, labels, class_names).save(target)
    except (OSError, ValueError) as error:
        raise OutputPathError(
            f"cannot write {target}: {error}", fix="choose a writable path that ends in .png"
        ) from error
    return target


def first_of_each(labels: Tensor, count: int) -> Tensor:
    """Where the first `count` images of each class stand in labels (N,): indices in ascending order."""
    places = [torch.nonzero(labels == label).flatten()[:count] for label in labels.unique()]
    return torch.cat(places).sort().values if places else labels.new_empty(0)
