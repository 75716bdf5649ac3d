"""Each kind of data set, read with the same choices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import Tensor

from dither.data.arrays import check_array
from dither.data.checking import Checked, Progress, check_images
from dither.data.decoding import decode
from dither.data.digits import CLASS_NAMES, digits
from dither.data.folder import list_images, split_folder
from dither.data.hub import address_of, open_hub
from dither.data.idx import idx_class_names, read_idx
from dither.data.image_data import ImageData
from dither.data.labels import checked_labels, label_set
from dither.data.latents import check_latents, open_latents
from dither.data.npz import read_npz
from dither.data.preparation import Preparation
from dither.errors import ConfigurationError, NoHeldOutPartError

Split = Literal["train", "held-out"]


@dataclass(frozen=True)
class Choices:
    """What the user chose; `read_images` explains each."""

    preparation: Preparation
    class_names: Sequence[str] | None
    num_classes: int | None
    skip_broken: bool
    image_column: str | None
    label_column: str | None
    split: Split
    progress: Progress | None

    def label_set(self, recorded: Sequence[str] | None, where: object) -> tuple[str, ...]:
        """The names of the classes: given, or as the data set's files state them."""
        return label_set(self.class_names, self.num_classes, recorded, where)


def embedded_digits(choices: Choices) -> ImageData:
    """The digits inside scikit-learn."""
    images, labels = digits()[choices.split == "held-out"].tensors
    checked = check_array(images.numpy(), choices.preparation, where="digits")
    return _data(checked, labels.numpy(), choices.label_set(CLASS_NAMES, "digits"), "digits")


def idx_files(path: Path, files: tuple[Path, Path], choices: Choices) -> ImageData:
    """A folder of IDX files."""
    names = choices.label_set(idx_class_names(path), path)
    checked = check_array(read_idx(files[0], 3)[:, None], choices.preparation, where=path)
    return _data(checked, read_idx(files[1], 1), names, path.resolve().name)


def npz_file(path: Path, choices: Choices) -> ImageData:
    """An .npz of images and labels."""
    _only_train(path, choices)
    arrays = read_npz(path)
    names = choices.label_set(arrays.class_names, path)
    checked = check_array(arrays.images, choices.preparation, where=path, skip_broken=choices.skip_broken)
    return _data(checked, arrays.labels, names, path.stem)


def latents_file(path: Path, choices: Choices) -> ImageData:
    """Latents that `dither encode` wrote."""
    _only_train(path, choices)
    if choices.preparation != Preparation():
        raise ConfigurationError(
            f"{path} holds latents, whose size and channels are fixed",
            fix="leave image_size, channels, resize and crop out; give them to dither encode",
        )
    file = open_latents(path)
    names = choices.label_set(file.class_names, path)
    checked = check_latents(file, where=path, skip_broken=choices.skip_broken)
    data = _data(checked, file.labels, names, path.stem)
    data.latents = file.source
    return data


def image_folder(path: Path, choices: Choices) -> ImageData:
    """A folder with one subfolder per class."""
    part = split_folder(path, choices.split, choices.class_names)
    listing = list_images(part, choices.class_names)
    names = choices.label_set(listing.class_names, path)
    checked = _check_files(
        lambda example: decode(listing.files[example]),
        [str(file.relative_to(part)) for file in listing.files],
        part,
        choices,
    )
    return _data(checked, np.array(listing.labels), names, path.resolve().name, listing.left_out)


def hub_dataset(name: str, choices: Choices) -> ImageData:
    """A Hugging Face dataset, saved in a folder or by its name."""
    found = open_hub(name, choices.split, choices.image_column, choices.label_column)
    names = choices.label_set(found.class_names, name)
    checked = _check_files(found.read, [f"example {i}" for i in range(len(found.labels))], name, choices)
    return _data(checked, found.labels, names, Path(address_of(name).name).name)


def _check_files(read: Callable[[int], Tensor], names: Sequence[str], where: object, choices: Choices) -> Checked:
    return check_images(
        read,
        names,
        choices.preparation,
        where=where,
        skip_broken=choices.skip_broken,
        progress=choices.progress,
    )


def _only_train(path: Path, choices: Choices) -> None:
    if choices.split == "held-out":
        raise NoHeldOutPartError(
            f"{path} has no held-out part", fix="give the file that holds it (dither evaluate --held_out)"
        )


def _data(
    checked: Checked,
    labels: np.ndarray[Any, Any],
    names: tuple[str, ...],
    name: str,
    left_out: tuple[str, ...] = (),
) -> ImageData:
    """The images that were kept with their labels."""
    count = len(checked.kept) + len(checked.left_out)
    return ImageData(
        checked.pixels,
        checked_labels(labels, count, names, name)[checked.kept],
        name=name,
        class_names=names,
        image_size=checked.image_size,
        channels=checked.channels,
        left_out=(*left_out, *checked.left_out),
    )
