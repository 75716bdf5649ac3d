"""Sampled images as files that are a data set again: a folder of PNGs, or arrays.

Shapes: N images (N, C, H, W) in [-1, 1], labels (N,) int64.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from dither.errors import ConfigurationError, OutputPathError


def to_pixels(images: Tensor) -> Tensor:
    """Images in [-1, 1] as uint8 in 0..255; what is not a number becomes black."""
    return ((images.detach().float().cpu().nan_to_num(-1).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def save_folder(images: Tensor, labels: Tensor, folder: Path, class_names: Sequence[str] | None = None) -> int:
    """Write each image as a PNG into a subfolder of its class, `folder/<class>/00000.png`.

    Args:
        images: C is 1 (grey) or 3 (RGB).
        labels: class of each.
        folder: made if missing; files of the same names are replaced.
        class_names: names of the subfolders, by label; None takes the labels' digits, padded so that their order as
            words is the labels' order.

    Returns:
        How many files were written.

    Raises:
        ConfigurationError: images that are neither grey nor RGB, or names that `check_folder_names` refuses.
        OutputPathError: a file cannot be written.
    """
    from PIL import Image

    check_folder_names(class_names or ())
    if images.shape[1] not in (1, 3):
        raise ConfigurationError(
            f"images with {images.shape[1]} channels are no PNGs", fix="write --npz, or decode the latents first"
        )
    pixels = to_pixels(images)
    width = len(str(int(labels.max()))) if len(labels) else 1
    counts: dict[int, int] = {}
    try:
        for picture, label in zip(pixels, labels.tolist(), strict=True):
            name = f"{label:0{width}}" if class_names is None else class_names[label]
            number = counts.get(label, 0)
            counts[label] = number + 1
            (folder / name).mkdir(parents=True, exist_ok=True)
            array = picture.squeeze(0) if len(picture) == 1 else picture.permute(1, 2, 0)
            Image.fromarray(array.contiguous().numpy()).save(folder / name / f"{number:05}.png")
    except OSError as error:
        raise OutputPathError(f"cannot write {folder}: {error}", fix="give a folder you may write") from error
    return len(pixels)


def check_folder_names(class_names: Sequence[str]) -> None:
    """Refuse class names that, as names of subfolders, would not be read again as these classes.

    Raises:
        ConfigurationError: one is a path of several parts, or begins with a dot.
    """
    for name in class_names:
        if name != Path(name).name or name.startswith("."):
            raise ConfigurationError(f"no folder can have the name of the class {name!r}", fix="write --npz")


def save_arrays(images: Tensor, labels: Tensor, file: BinaryIO, class_names: Sequence[str] | None = None) -> None:
    """Write images, labels and class names as arrays of an .npz, as `dither.data.read_images` reads them.

    Args:
        images: stored as float32, in [-1, 1].
        labels: stored as int64.
        file: open for writing bytes.
        class_names: one for each label; None leaves them out.
    """
    import numpy as np

    names: dict[str, Any] = {} if class_names is None else {"class_names": np.array(class_names)}
    np.savez_compressed(file, images=images.float().cpu().numpy(), labels=labels.cpu().numpy(), **names)
