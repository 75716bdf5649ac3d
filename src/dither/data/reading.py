"""One door to every kind of data set."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from dither.data.arrays import check_array
from dither.data.checking import Checked, Progress, check_images
from dither.data.decoding import decode
from dither.data.digits import CLASS_NAMES, digits
from dither.data.folder import list_images, split_folder
from dither.data.idx import find_idx, idx_class_names, read_idx
from dither.data.image_data import ImageData
from dither.data.labels import checked_labels, label_set
from dither.data.npz import read_npz
from dither.data.preparation import Preparation, Resize
from dither.errors import ConfigurationError, DataError

Split = Literal["train", "held-out"]

_KINDS = "a folder with one subfolder per class, a folder with IDX files, or an .npz"


def read_images(
    path: str | Path | None = None,
    *,
    image_size: int | None = None,
    channels: int | None = None,
    resize: Resize = "bicubic",
    crop: bool = True,
    class_names: Sequence[str] | None = None,
    num_classes: int | None = None,
    skip_broken: bool = False,
    split: Split = "train",
    progress: Progress | None = None,
) -> ImageData:
    """Read a data set of labelled images.

    Args:
        path: a folder with one subfolder per class, a folder with IDX files, or an .npz; None is the embedded digits.
        image_size: side in pixels; None keeps the images' own, which must be one size and square.
        channels: 1 or 3; None keeps the images' own.
        resize: interpolation, with antialiasing except for nearest; "none" only cuts.
        crop: cut the centred square before resizing; False stretches what is not square.
        class_names: the label set, in the labels' order; by default what the folders or files say.
        num_classes: size of the label set, where nothing names the classes.
        skip_broken: leave images out that cannot be read, instead of refusing.
        split: "train", or "held-out": IDX's t10k files, a folder's test, val or validation.
        progress: called with the number of images looked at and of all, while image files are checked.

    Raises:
        ConfigurationError: an argument that cannot work.
        DataError: the data set is not there, damaged, or not what it should be.
        BrokenImagesError: images that cannot be read, by name.
    """
    if split not in get_args(Split):
        raise ConfigurationError(f"split {split!r} is not known", fix="train or held-out")
    preparation = Preparation(image_size, channels, resize, crop)
    if path is None:
        return _digits(preparation, split, class_names, num_classes)
    path = Path(path)
    if path.is_dir():
        idx = find_idx(path, split)
        if idx is not None:
            names = label_set(class_names, num_classes, idx_class_names(path), path)
            checked = check_array(read_idx(idx[0], 3)[:, None], preparation, where=path)
            return _data(checked, read_idx(idx[1], 1), names, path)
        return _folder(split_folder(path, split), preparation, class_names, num_classes, skip_broken, progress, path)
    if not path.exists():
        raise DataError(f"there is no {path}", fix=f"give {_KINDS}")
    if path.suffix != ".npz":
        raise DataError(f"{path} is no data set that dither reads", fix=f"give {_KINDS}")
    if split == "held-out":
        raise DataError(f"{path} has no held-out part", fix="give the file that holds it as a data set of its own")
    arrays = read_npz(path)
    names = label_set(class_names, num_classes, arrays.class_names, path)
    checked = check_array(arrays.images, preparation, where=path, skip_broken=skip_broken)
    return _data(checked, arrays.labels, names, path)


def _digits(
    preparation: Preparation, split: Split, class_names: Sequence[str] | None, num_classes: int | None
) -> ImageData:
    images, labels = digits()[split == "held-out"].tensors
    names = label_set(class_names, num_classes, CLASS_NAMES, "digits")
    checked = check_array(images.numpy(), preparation, where="digits")
    return _data(checked, labels.numpy(), names, Path("digits"))


def _folder(
    part: Path,
    preparation: Preparation,
    class_names: Sequence[str] | None,
    num_classes: int | None,
    skip_broken: bool,
    progress: Progress | None,
    path: Path,
) -> ImageData:
    listing = list_images(part, class_names)
    names = label_set(class_names, num_classes, listing.class_names, path)
    checked = check_images(
        lambda example: decode(listing.files[example]),
        [str(file.relative_to(part)) for file in listing.files],
        preparation,
        where=part,
        skip_broken=skip_broken,
        progress=progress,
    )
    return _data(checked, np.array(listing.labels), names, path, listing.left_out)


def _data(
    checked: Checked, labels: np.ndarray, names: tuple[str, ...], path: Path, left_out: tuple[str, ...] = ()
) -> ImageData:
    """Labels of the images that were kept, checked, and all put together."""
    count = len(checked.kept) + len(checked.left_out)
    return ImageData(
        checked.pixels,
        checked_labels(labels, count, names, path)[checked.kept],
        name=path.resolve().name if path.exists() else path.name,
        class_names=names,
        image_size=checked.image_size,
        channels=checked.channels,
        left_out=(*left_out, *checked.left_out),
    )
