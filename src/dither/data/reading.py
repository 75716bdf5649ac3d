"""One door to every kind of data set."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

from dither.data import sources
from dither.data.checking import Progress
from dither.data.hub import is_saved_dataset
from dither.data.idx import find_idx, is_idx_folder
from dither.data.image_data import ImageData
from dither.data.preparation import Preparation, Resize
from dither.data.sources import Choices, Split
from dither.errors import ConfigurationError, DataError

HUB = "hf:"
"""Before the name of a Hugging Face dataset, so that a mistyped path asks no server."""

_KINDS = (
    "a folder with one subfolder per class, a folder with IDX files, an .npz, latents in .safetensors, or a Hugging "
    "Face dataset: a saved folder, or hf:NAME, hf:NAME@REVISION, hf:NAME:CONFIGURATION"
)


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
    image_column: str | None = None,
    label_column: str | None = None,
    split: Split = "train",
    progress: Progress | None = None,
) -> ImageData:
    """Read a data set of labelled images.

    Each image is prepared by itself and by public constants; nothing is computed from several.

    Args:
        path: a folder with one subfolder per class, a folder with IDX files, an .npz, latents of `dither encode`
            (.safetensors), or a Hugging Face dataset (a folder of `save_to_disk`, or hf:NAME, with @REVISION,
            :CONFIGURATION or both after it); None is the embedded digits.
        image_size: side in pixels; None keeps the images' own, which must be one size and square.
        channels: 1 or 3; None keeps the images' own, which must be of one kind.
        resize: interpolation, with antialiasing except for nearest; "none" only cuts.
        crop: cut the centred square before resizing; False stretches what is not square.
        class_names: the label set, in the labels' order; by default what the folders or files say.
        num_classes: size of the label set, where nothing names the classes.
        skip_broken: leave images out that cannot be read, instead of refusing. The rule looks at each image alone.
        image_column: of a Hugging Face dataset; None takes the only one with images.
        label_column: of a Hugging Face dataset; None takes the only one with classes.
        split: "train", or "held-out": IDX's t10k files, a folder's or dataset's test or validation part.
        progress: called with the number of images looked at and of all, while image files are checked.

    Raises:
        ConfigurationError: an argument that cannot work.
        DataError: the data set is not there, damaged, or not what it should be.
        BrokenImagesError: images that cannot be read, by name.
        MissingPackageError: a Hugging Face dataset, and the package datasets is not installed.
    """
    if split not in get_args(Split):
        raise ConfigurationError(f"split {split!r} is not known", fix="train or held-out")
    choices = Choices(
        preparation=Preparation(image_size, channels, resize, crop),
        class_names=class_names,
        num_classes=num_classes,
        skip_broken=skip_broken,
        image_column=image_column,
        label_column=label_column,
        split=split,
        progress=progress,
    )
    if path is None:
        return sources.embedded_digits(choices)
    where = Path(path)
    match _kind_of(path):
        case "hub":
            return sources.hub_dataset(str(path).removeprefix(HUB), choices)
        case "saved dataset":
            return sources.hub_dataset(str(path), choices)
        case "idx":
            return sources.idx_files(where, find_idx(where, choices.split), choices)
        case "class folders":
            return sources.image_folder(where, choices)
        case "npz":
            return sources.npz_file(where, choices)
        case "latents":
            return sources.latents_file(where, choices)
        case "nothing":
            raise DataError(f"there is no {path}", fix=f"give {_KINDS}")
        case "unknown":
            raise DataError(f"{path} is no data set that dither reads", fix=f"give {_KINDS}")


def classes_are_folders(path: str | Path) -> bool:
    """Whether the labels of a data set are its subfolders' names; those of all other kinds are numbers."""
    return _kind_of(path) == "class folders"


_Kind = Literal["hub", "saved dataset", "idx", "class folders", "npz", "latents", "nothing", "unknown"]


def _kind_of(path: str | Path) -> _Kind:
    """What lies at a path, by its name and the names in it."""
    if str(path).startswith(HUB):
        return "hub"
    path = Path(path)
    if path.is_dir():
        if is_saved_dataset(path):
            return "saved dataset"
        return "idx" if is_idx_folder(path) else "class folders"
    if not path.exists():
        return "nothing"
    suffixes: dict[str, _Kind] = {".npz": "npz", ".safetensors": "latents"}
    return suffixes.get(path.suffix, "unknown")
