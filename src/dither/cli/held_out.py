"""Real images that a model never saw, prepared and labelled as those it was trained on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from dither.cli.data import read_data
from dither.cli.options import Data
from dither.errors import ConfigurationError, DataError, NoHeldOutPartError

if TYPE_CHECKING:
    from dither.data import ImageData


def read_held_out(path: str | None, data: Data, training: ImageData, console: Console) -> ImageData:
    """Read the held-out images: the data set's own part, or another data set's; all of one that has no such part.

    Args:
        path: as `--data.path` takes it; None for the data set's own part.
        data: options of the training images.
        training: the training images.
        console: where bars and what was left out are shown.

    Raises:
        DataError: there is none, or its classes are not the training images'.
        ConfigurationError: path is the data set itself, and has no held-out part.
    """
    from dither.data import classes_are_folders

    alike = replace(data, image_size=training.image_size, channels=1 if training.channels == 1 else 3)
    source = data.path if path is None else path
    if source is not None and classes_are_folders(source):
        alike = replace(alike, class_names=list(training.class_names), num_classes=None)
    elif path is not None:  # labels are numbers, in the order of the names that the files state
        alike = replace(alike, class_names=None, num_classes=training.num_classes)
    alike = replace(alike, path=source)
    try:
        found = read_data(alike, console, "held-out")
    except NoHeldOutPartError:
        if path is None:
            raise
        if data.path is not None and _same(path, data.path):
            raise ConfigurationError(
                f"{path} holds the training images", fix="give images that the model never saw"
            ) from None
        found = read_data(alike, console)
    numbers = tuple(str(label) for label in range(training.num_classes))
    if found.class_names not in (training.class_names, numbers):
        raise DataError(
            f"the classes of {source} are {', '.join(found.class_names)}; the training images' are "
            f"{', '.join(training.class_names)}",
            fix="give held-out images of the same classes, in the same order",
        )
    return found


def _same(one: str, other: str | Path) -> bool:
    return one == str(other) or (Path(one).exists() and Path(one).resolve() == Path(other).resolve())
