"""Images that come as one array: prepared at once, and held."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from dither.data.checking import Checked, refuse_or_list
from dither.data.image_data import Held
from dither.data.preparation import Preparation
from dither.errors import DataError

_CHUNK = 4096


def check_array(
    array: np.ndarray[Any, Any], preparation: Preparation, *, where: object, skip_broken: bool = False
) -> Checked:
    """Look at every image once, and bring all to one size.

    Args:
        array: (N, C, H, W), C is 1 or 3; uint8, or floating point in [-1, 1].
        preparation: brings each to one shape.
        where: the data set, for messages.
        skip_broken: leave images out that cannot be used, instead of refusing the data set.

    Raises:
        BrokenImagesError: images with values outside the range, and skip_broken is not set, or no others are left.
        DataError: there are none, or they are not square and no image_size is given.
    """
    count, _, height, width = array.shape
    if not array.size:
        raise DataError(f"{where} has no images", fix="give a data set with at least one image")
    if height != width and preparation.image_size is None:
        raise DataError(
            f"the images of {where} are {height} x {width}, not square",
            fix="say to which side they are brought: --data.image_size 32",
        )
    images = torch.from_numpy(array)
    broken = _out_of_range(images) if images.is_floating_point() else {}
    left_out = refuse_or_list(broken, [f"example {i}" for i in range(count)], where, skip_broken)
    kept = torch.arange(count)
    if broken:
        kept = torch.tensor([i for i in range(count) if i not in broken], dtype=torch.int64)
        images = images[kept]
    prepared = _in_chunks(images, preparation)
    return Checked(Held(prepared), kept, prepared.shape[1], prepared.shape[2], left_out)


def _in_chunks(images: Tensor, preparation: Preparation) -> Tensor:
    """Prepared images; the very ones given if nothing is to be done."""
    first = preparation(images[:1])
    if first.shape[1:] == images.shape[1:]:
        return images
    return torch.cat([preparation(chunk) for chunk in images.split(_CHUNK)])


def _out_of_range(images: Tensor) -> dict[int, str]:
    broken: dict[int, str] = {}
    for start in range(0, len(images), _CHUNK):
        chunk = images[start : start + _CHUNK].flatten(1)
        outside = ~(chunk.abs() <= 1).all(1)
        for place in outside.nonzero().flatten().tolist():
            finite = bool(chunk[place].isfinite().all())
            broken[start + place] = "values outside [-1, 1]" if finite else "values that are not finite"
    return broken
