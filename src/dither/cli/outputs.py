"""Where a command writes: nothing that exists is replaced unless the user asks."""

from __future__ import annotations

from pathlib import Path

from dither.cli.run_folder import check_writable
from dither.errors import ConfigurationError, OutputPathError


def check_new_file(file: Path, overwrite: bool) -> None:
    """Refuse, before any work, a file that is there already or could not be written after it.

    Raises:
        OutputPathError: it is there and `overwrite` is not given, or its folder cannot be written.
    """
    check_writable(file)
    if file.exists() and not overwrite:
        raise OutputPathError(f"{file} is there already", fix="give another name, or --overwrite")


def check_new_folder(folder: Path) -> None:
    """Refuse a folder with anything in it: files of before would be taken for part of what is written.

    Raises:
        OutputPathError: it is a file, not empty, or its parent cannot be written.
    """
    if folder.is_file():
        raise OutputPathError(f"{folder} is a file, not a folder", fix="give another path")
    if folder.is_dir() and any(folder.iterdir()):
        raise OutputPathError(f"{folder} is not empty, and dither deletes nothing", fix="empty it, or give another")
    check_writable(folder / "image.png" if folder.is_dir() else folder)


def check_picture(file: Path) -> None:
    """Refuse, before any work, a name by which no kind of picture is known.

    Raises:
        ConfigurationError: its ending.
    """
    from PIL import Image

    if Image.registered_extensions().get(file.suffix.lower()) not in Image.SAVE:
        raise ConfigurationError(f"{file} does not end as a picture does", fix=f"--output {file.with_suffix('.png')}")
