"""Hugging Face datasets, from a folder of `save_to_disk` or by name."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from dither.data.decoding import UnreadableImageError, decode
from dither.errors import DataError, MissingPackageError, NoHeldOutPartError, reason_of

_HELD_OUT = ("test", "validation", "valid", "val")


@dataclass(frozen=True)
class HubExamples:
    """Examples of a Hugging Face dataset.

    Args:
        read: the raw image of an example; raises UnreadableImageError.
        labels: (N,).
        class_names: as the dataset states them; None if the label column has none.
    """

    read: Callable[[int], Tensor]
    labels: np.ndarray[Any, Any]
    class_names: tuple[str, ...] | None


@dataclass(frozen=True)
class Address:
    """Which dataset is meant.

    Args:
        name: a folder, or a name on the hub.
        revision: branch, tag or commit there; None for the newest.
        configuration: which of the dataset's parts with data of their own; None for the only one.
    """

    name: str
    revision: str | None = None
    configuration: str | None = None


def address_of(text: str) -> Address:
    """Take NAME, NAME@REVISION, NAME:CONFIGURATION or NAME@REVISION:CONFIGURATION apart.

    Names on the hub hold neither sign, and git's revisions and the library's configurations no colon. A folder that is
    there is taken whole, whatever its name holds.
    """
    if Path(text).exists():
        return Address(text)
    name, _, configuration = text.partition(":")
    name, _, revision = name.partition("@")
    return Address(name, revision or None, configuration or None)


def is_saved_dataset(folder: Path) -> bool:
    """Whether `save_to_disk` wrote this folder."""
    saved = (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()
    return saved or (folder / "dataset_dict.json").is_file()


def open_hub(name: str, split: str, image_column: str | None, label_column: str | None) -> HubExamples:
    """Open a dataset; images are decoded by `dither.data.decoding`, like any file.

    Args:
        name: a folder, or a name on the hub, as `address_of` takes it, which the library downloads.
        split: "train" or "held-out".
        image_column: None for the only one with images.
        label_column: None for the only one with classes.

    Raises:
        MissingPackageError: the package datasets is not installed.
        DataError: it cannot be opened, or does not say which columns hold images and labels.
    """
    try:
        import datasets
    except ImportError as error:
        raise MissingPackageError(
            f"{name} is a Hugging Face dataset, and the package datasets is not installed",
            fix="pip install 'dither[datasets]'",
        ) from error
    address = address_of(name)
    try:
        if is_saved_dataset(Path(name)):
            loaded = datasets.load_from_disk(name)
        else:
            loaded = datasets.load_dataset(address.name, address.configuration, revision=address.revision)
    except Exception as error:  # the library raises what its readers and its client raise
        raise _unopened(address, error) from error
    data = _part(loaded, split, name) if isinstance(loaded, dict) else loaded
    if split != "train" and data is loaded:
        raise NoHeldOutPartError(
            f"the dataset {name} has no parts", fix="give the one that holds it (dither evaluate --held_out)"
        )
    data = data.with_format(None)  # one that it was saved with may hide columns or give other types
    image = _column(data, image_column, (datasets.Image,), "image", name)
    label = _column(data, label_column, (datasets.ClassLabel, datasets.Value), "label", name)
    raw = data.select_columns([image]).cast_column(image, datasets.Image(decode=False))  # no other column is decoded

    def read(example: int) -> Tensor:
        stored = raw[example][image]
        if stored is None or (stored["bytes"] is None and stored["path"] is None):
            raise UnreadableImageError("there is no image")
        content = stored["bytes"]
        return decode(Path(stored["path"]) if content is None else content)

    feature = data.features[label]
    names = tuple(feature.names) if isinstance(feature, datasets.ClassLabel) else None
    return HubExamples(read, np.asarray(data.select_columns([label]).with_format("numpy")[label][:]), names)


def _unopened(address: Address, error: Exception) -> DataError:
    """What to say of a dataset that cannot be opened; where a configuration is missing, which there are."""
    import datasets

    name, known = address.name, []
    if isinstance(error, ValueError):  # the library's, where a configuration is missing or unknown
        with contextlib.suppress(Exception):
            known = datasets.get_dataset_config_names(name, revision=address.revision)
    if known and address.configuration not in known and (address.configuration or len(known) > 1):
        named = f"not {address.configuration}" if address.configuration else "none is named"
        at = f"@{address.revision}" if address.revision else ""
        return DataError(
            f"the dataset {name} has the configurations {', '.join(known)}, and {named}",
            fix=f"name one: --data.path hf:{name}{at}:{known[0]}",
        )
    return DataError(
        f"the dataset {name} cannot be opened: {reason_of(error)}",
        fix="check the name or the folder; of a name on the hub also revision and configuration, "
        "hf:NAME@REVISION:CONFIGURATION",
    )


def _part(parts: dict[str, Any], split: str, name: str) -> Any:
    wanted = ("train",) if split == "train" else _HELD_OUT
    found = next((parts[part] for part in wanted if part in parts), None)
    if found is None:
        kind = DataError if split == "train" else NoHeldOutPartError
        raise kind(
            f"the dataset {name} has the parts {', '.join(parts)}, and none called {' or '.join(wanted)}",
            fix="save the part you want with save_to_disk, and give that folder",
        )
    return found


def _column(data: Any, given: str | None, kinds: tuple[type, ...], what: str, name: str) -> str:
    """The column that was named, of one of these kinds, else the only one of the first kind."""
    kind = kinds[0]
    if given is not None:
        if given in data.features and isinstance(data.features[given], kinds):
            return given
        raise DataError(
            f"the dataset {name} has no {what} column {given!r}",
            fix=f"its columns: {', '.join(f'{key} ({type(value).__name__})' for key, value in data.features.items())}",
        )
    found = [str(key) for key, value in data.features.items() if isinstance(value, kind)]
    if len(found) != 1:
        raise DataError(
            f"the dataset {name} has {len(found)} columns of type {kind.__name__}: {', '.join(found) or 'none'}",
            fix=f"name the one to take: --data.{what}_column; its columns: {', '.join(data.features)}",
        )
    return found[0]
