"""A folder of images with one subfolder per class."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dither.errors import DataError, NoHeldOutPartError

TRAIN = ("train", "training")
HELD_OUT = ("test", "val", "valid", "validation", "held-out")
_LAYOUT = "one subfolder for each class, images in it: data/cat/1.png, data/dog/2.png"
_SHOWN = 5


@dataclass(frozen=True)
class Listing:
    """The image files of a folder, in a fixed order.

    Args:
        files: each once.
        labels: index of each file's class.
        class_names: the subfolders, sorted, or what the user gave.
        left_out: what else lies there, each with the reason.
    """

    files: tuple[Path, ...]
    labels: tuple[int, ...]
    class_names: tuple[str, ...]
    left_out: tuple[str, ...]


def split_folder(root: Path, split: str, class_names: Sequence[str] | None = None) -> Path:
    """The part of a folder that holds a split: root itself for "train", unless it has subfolders train and test.

    Args:
        root: the folder.
        split: "train" or "held-out".
        class_names: what the user calls the classes, if anything.

    Raises:
        NoHeldOutPartError: the held-out part was asked for, and there is none.
        DataError: there is a held-out part beside other folders than train, and nobody calls it a class.
    """
    parts = {name: root / name for name in (*TRAIN, *HELD_OUT) if any(_folders(root / name))}
    train = next((parts[name] for name in TRAIN if name in parts), None)
    held_out = next((parts[name] for name in HELD_OUT if name in parts), None)
    if split == "train":
        if train is None and held_out is not None and held_out.name not in (class_names or ()):
            raise DataError(
                f"{root} has {held_out.name} with folders in it, and no {TRAIN[0]}: it would be trained as a class",
                fix=f"move the class folders for training into {root / TRAIN[0]}, or, if it is a class, name all of "
                "them: --data.class_names",
            )
        return train or root
    if train is None or held_out is None:
        raise NoHeldOutPartError(
            f"{root} has no held-out part",
            fix=f"put it in {root / 'test'} beside {root / 'train'}, or give its folder (dither evaluate --held_out)",
        )
    return held_out


def list_images(root: Path, class_names: Sequence[str] | None = None) -> Listing:
    """List the images of every class folder, and of the folders in it.

    A file counts as an image if its name ends as one; hidden files do not. Links to folders are followed for the class
    folders only, so that there are no loops. A file that is reached twice is refused: it would be two examples, and
    the privacy unit is one.

    Args:
        root: the folder.
        class_names: the label set, in the labels' order; by default the subfolders, sorted.

    Raises:
        DataError: no class folders, no images, a class that `class_names` lacks, or a file that is reached twice.
    """
    found = sorted(entry.name for entry in _folders(root))
    if all(name.isdecimal() for name in found):
        found.sort(key=int)  # 10 after 9
    if not found:
        raise DataError(f"{root} has no subfolders", fix=f"make {_LAYOUT}")
    names = tuple(found if class_names is None else class_names)
    unknown = [name for name in found if name not in names]
    if unknown:
        raise DataError(
            f"{root} has the folder {unknown[0]!r}, which is not in --data.class_names",
            fix=f"add it, or move it away; the names given: {', '.join(names)}",
        )
    suffixes = _image_suffixes()
    files: list[Path] = []
    labels: list[int] = []
    left_out = [f"{entry.name}: lies in no class folder" for entry in _plain_files(root)]
    for name in found:
        for path in _walk(root / name):
            if path.is_dir():
                left_out.append(f"{path.relative_to(root)}: a link to a folder")
            elif path.suffix.lower() in suffixes:
                files.append(path)
                labels.append(names.index(name))
            else:
                left_out.append(f"{path.relative_to(root)}: no image by its name")
    if not files:
        raise DataError(f"{root} has {len(found)} subfolders and no images in them", fix=f"make {_LAYOUT}")
    _refuse_twice(files)
    return Listing(tuple(files), tuple(labels), names, tuple(left_out))


def _folders(root: Path) -> Iterator[os.DirEntry[str]]:
    for entry in _entries(root):
        try:
            if entry.is_dir():
                yield entry
        except OSError as error:
            raise DataError(f"{entry.path} cannot be read: {error.strerror}", fix="remove the link") from error


def _plain_files(root: Path) -> list[os.DirEntry[str]]:
    return sorted((entry for entry in _entries(root) if not entry.is_dir()), key=lambda entry: entry.name)


def _entries(root: Path) -> list[os.DirEntry[str]]:
    if not root.is_dir():
        return []
    try:
        return [entry for entry in os.scandir(root) if not entry.name.startswith(".")]
    except OSError as error:
        raise DataError(f"{root} cannot be read: {error.strerror}", fix="give a folder you may read") from error


def _walk(folder: Path) -> Iterator[Path]:
    """Every file below a folder, and the links to folders, which are not followed."""

    def refuse(error: OSError) -> None:
        raise DataError(
            f"{error.filename} cannot be read: {error.strerror}", fix="give folders you may read"
        ) from error

    for where, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        links = [name for name in folders if os.path.islink(os.path.join(where, name))]
        yield from (Path(where, name) for name in sorted(links + files) if not name.startswith("."))


def _refuse_twice(files: Sequence[Path]) -> None:
    first: dict[tuple[int, int], Path] = {}
    twice: list[tuple[Path, Path]] = []
    for path in files:
        try:
            status = path.stat()
        except OSError:
            continue  # a dead link: named with the broken images
        before = first.setdefault((status.st_dev, status.st_ino), path)
        if before is not path:
            twice.append((before, path))
    if twice:
        shown = ", ".join(f"{one} and {other}" for one, other in twice[:_SHOWN])
        raise DataError(
            f"{len(twice)} files are reached by two paths: {shown}",
            fix="remove the links: such an image would count as two examples, and one example is what is protected",
        )


def _image_suffixes() -> frozenset[str]:
    from PIL import Image

    return frozenset(suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN)
