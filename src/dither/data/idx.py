"""IDX files, the format of MNIST and Fashion-MNIST.

Source: Y. LeCun, C. Cortes, C. Burges, "The MNIST database", section "The IDX file format": two zero bytes, a byte for
the type, a byte for the number of axes, each axis as a big-endian 32-bit number, then the data.
"""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from dither.errors import DataError

_UNSIGNED_BYTE = 0x08
_PARTS = {"train": "train", "held-out": "t10k"}
_KINDS = {"images": 3, "labels": 1}
MNIST_CLASSES = 10
"""Labels of the data sets that come in this format by these file names, unless the user says otherwise."""

FASHION_MNIST = (
    "t-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle-boot",
)
"""Names of Fashion-MNIST's classes (Xiao, Rasul and Vollgraf 2017, table 2), for a folder of that name."""


def find_idx(folder: Path, split: str) -> tuple[Path, Path]:
    """The image and label files of a split of an IDX folder.

    Args:
        folder: holds train-images-idx3-ubyte, train-labels-idx1-ubyte and the same with t10k, plain or with .gz.
        split: "train" or "held-out".

    Raises:
        DataError: those of this split are not there.
    """
    images, labels = (_file(folder, _PARTS[split], kind) for kind in _KINDS)
    if images is None or labels is None:
        kind = "images" if images is None else "labels"
        raise DataError(
            f"{folder} has IDX files but no {_PARTS[split]}-{kind}-idx{_KINDS[kind]}-ubyte or the same with .gz",
            fix="put the missing file there",
        )
    return images, labels


def is_idx_folder(folder: Path) -> bool:
    """Whether a folder holds IDX files, of any split."""
    return any(_file(folder, part, kind) for part in _PARTS.values() for kind in _KINDS)


def idx_class_names(folder: Path) -> tuple[str, ...]:
    """The public label set of an IDX folder whose user named none."""
    if folder.resolve().name == "fashion-mnist":
        return FASHION_MNIST
    return tuple(str(label) for label in range(MNIST_CLASSES))


def read_idx(file: Path, axes: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The array in an IDX file of unsigned bytes: a view of the file's bytes, not a copy.

    Args:
        file: plain, or compressed if its name ends in .gz.
        axes: how many axes it must have.

    Raises:
        DataError: not such a file, or truncated.
    """
    try:
        if file.suffix == ".gz":
            with gzip.open(file) as stream:
                content: Any = np.frombuffer(bytearray(stream.read()), np.uint8)
        else:
            content = np.fromfile(file, np.uint8)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{file} cannot be read: {error}", fix="fetch it again; it is truncated or damaged") from error
    start = 4 + 4 * axes
    magic = bytes(content[:4])
    if magic != bytes((0, 0, _UNSIGNED_BYTE, axes)):
        raise DataError(
            f"{file} begins with {magic.hex(' ') or 'nothing'}, not with 00 00 08 {axes:02x}: it is no IDX file of "
            f"unsigned bytes with {axes} axes",
            fix="check that images and labels are not exchanged, and that the file is whole",
        )
    shape = tuple(int(length) for length in content[4:start].view(">u4")) if len(content) >= start else ()
    if len(shape) != axes or len(content) - start != math.prod(shape):
        raise DataError(
            f"{file} says it holds {' x '.join(map(str, shape)) or 'nothing'} bytes of data and has "
            f"{max(len(content) - start, 0)}",
            fix="fetch it again; it is truncated or damaged",
        )
    array: np.ndarray[Any, np.dtype[np.uint8]] = content[start:].reshape(shape)
    return array


def _file(folder: Path, part: str, kind: str) -> Path | None:
    stem = f"{part}-{kind}-idx{_KINDS[kind]}-ubyte"
    dotted = f"{part}-{kind}.idx{_KINDS[kind]}-ubyte"
    names = (stem, f"{stem}.gz", dotted, f"{dotted}.gz")
    return next((folder / name for name in names if (folder / name).is_file()), None)
