"""Arrays in an .npz: what `dither sample --npz` writes, and what others exchange."""

from __future__ import annotations

import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dither.errors import DataError

_FIX = "store images (N, H, W), (N, C, H, W) or (N, H, W, C) and labels (N,), as `dither sample --npz` does"


@dataclass(frozen=True)
class Arrays:
    """What an .npz holds.

    Args:
        images: (N, C, H, W), uint8 or floating point.
        labels: (N,).
        class_names: None if the file has none.
    """

    images: np.ndarray[Any, Any]
    labels: np.ndarray[Any, Any]
    class_names: tuple[str, ...] | None


def read_npz(file: Path) -> Arrays:
    """Read images, labels and, where they are stored, class_names. Pickles are never loaded.

    Raises:
        DataError: not such a file.
    """
    try:
        with np.load(file, allow_pickle=False) as saved:
            missing = [key for key in ("images", "labels") if key not in saved]
            if missing:
                raise DataError(f"{file} has {', '.join(saved.files) or 'nothing'}, but no {missing[0]}", fix=_FIX)
            images, labels = saved["images"], saved["labels"]
            names = tuple(map(str, saved["class_names"].tolist())) if "class_names" in saved else None
    except (OSError, EOFError, zipfile.BadZipFile, zlib.error, AttributeError, TypeError) as error:
        raise DataError(f"{file} cannot be read: {error}", fix=f"write it again; {_FIX}") from error
    except ValueError as error:  # numpy's for a pickle
        raise DataError(f"{file} cannot be read without running code: {error}", fix=_FIX) from error
    images = _channels_first(images, file)
    if images.dtype.kind == "f":
        images = images.astype(np.float32, copy=False)
    labels = labels.astype(labels.dtype.newbyteorder("="), copy=False)  # torch knows the machine's own order only
    return Arrays(images, labels, names)


def _channels_first(images: np.ndarray[Any, Any], file: Path) -> Any:
    if images.dtype != np.uint8 and images.dtype.kind != "f":
        raise DataError(f"{file} has images of type {images.dtype}", fix="store uint8 in 0..255, or floats in [-1, 1]")
    if images.ndim == 3:
        return images[:, None]
    if images.ndim == 4 and images.shape[1] in (1, 3):
        return images
    if images.ndim == 4 and images.shape[3] in (1, 3):
        return images.transpose(0, 3, 1, 2)
    raise DataError(f"{file} has images of shape {images.shape}", fix=_FIX)
