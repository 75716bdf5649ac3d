"""Every image is looked at once before training, by itself: what cannot be used is counted and named.

An image is left out by a rule that looks at that image alone. So a data set with one image more leads to the same data
set with at most one image more, and the claim about adding or removing one example stays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from dither.data.decoding import UnreadableImageError
from dither.data.image_data import Held, Pixels
from dither.data.preparation import Preparation, normalised
from dither.errors import BrokenImagesError, DataError

Progress = Callable[[int, int], None]
"""Called with the number of images looked at, and of all."""

HELD_BYTES = 2**30
"""Prepared images that take no more are held in memory; others are decoded at each use."""

_CHUNK = 256
_THREADS = 8
_SHOWN = 100


@dataclass(frozen=True)
class Checked:
    """What the look at every image found.

    Args:
        pixels: the images that can be used, prepared.
        kept: (n,) their places among all.
        channels: of each.
        image_size: their side.
        left_out: names and reasons of the others.
    """

    pixels: Pixels
    kept: Tensor
    channels: int
    image_size: int
    left_out: tuple[str, ...]


@dataclass(frozen=True)
class Decoded:
    """Images that are read, decoded and prepared whenever they are asked for.

    Args:
        read: the raw image (C, H, W), uint8, of an example.
        chosen: (n,) the examples, among those `read` knows.
        preparation: brings each to one shape.
    """

    read: Callable[[int], Tensor]
    chosen: Tensor
    preparation: Preparation

    def __len__(self) -> int:
        """Number of images."""
        return len(self.chosen)

    def take(self, indices: Tensor) -> Tensor:
        """Images (b, C, H, W) at indices (b,), float32."""

        def one(example: int) -> Tensor:
            try:
                return self.preparation(self.read(example))
            except UnreadableImageError as error:
                raise DataError(
                    f"example {example} could be read when the run began, and no longer: {error}",
                    fix="do not change the data while a run reads it; then dither train --resume",
                ) from error

        with ThreadPoolExecutor(_THREADS) as pool:
            return normalised(torch.stack(list(pool.map(one, self.chosen[indices].tolist()))))


def check_images(
    read: Callable[[int], Tensor],
    names: Sequence[str],
    preparation: Preparation,
    *,
    where: object,
    skip_broken: bool = False,
    progress: Progress | None = None,
) -> Checked:
    """Decode and prepare every image once.

    Args:
        read: the raw image (C, H, W), uint8, of an example; raises UnreadableImageError.
        names: what each example is called in messages.
        preparation: brings each to one shape.
        where: the data set, for messages.
        skip_broken: leave images out that cannot be used, instead of refusing the data set.
        progress: told how far it is.

    Raises:
        BrokenImagesError: images cannot be used and skip_broken is not set, or none can be used.
        DataError: there are none, or of several sizes or kinds, or not square, and preparation does not say what to do.
    """
    if not names:
        raise DataError(f"{where} has no images", fix="give a data set with at least one image")
    broken: dict[int, str] = {}
    shapes: dict[tuple[int, ...], int] = {}  # the first example of each shape
    held: list[Tensor] | None = []
    held_bytes = 0

    def look(example: int) -> Tensor | str:
        try:
            return preparation(read(example))
        except UnreadableImageError as error:
            return str(error)
        except DataError as error:
            return error.what

    with ThreadPoolExecutor(_THREADS) as pool:
        for start in range(0, len(names), _CHUNK):
            chunk = range(start, min(start + _CHUNK, len(names)))
            for example, found in zip(chunk, pool.map(look, chunk), strict=True):
                if isinstance(found, str):
                    broken[example] = found
                    continue
                shapes.setdefault(tuple(found.shape), example)
                held_bytes += found.numel()
                held = held if held is not None and held_bytes <= HELD_BYTES else None
                if held is not None:
                    held.append(found)
            if progress is not None:
                progress(chunk.stop, len(names))
    left_out = refuse_or_list(broken, names, where, skip_broken)
    channels, size = _one_shape(shapes, names, where)
    kept = torch.tensor([i for i in range(len(names)) if i not in broken], dtype=torch.int64)
    pixels = Held(torch.stack(held)) if held is not None else Decoded(read, kept, preparation)
    return Checked(pixels, kept, channels, size, left_out)


def refuse_or_list(broken: dict[int, str], names: Sequence[str], where: object, skip_broken: bool) -> tuple[str, ...]:
    """Names and reasons of examples that cannot be used.

    Raises:
        BrokenImagesError: there are some and skip_broken is not set, or no others are left.
    """
    reasons = tuple(f"{names[example]}: {reason}" for example, reason in sorted(broken.items()))
    if reasons and (not skip_broken or len(broken) == len(names)):
        more = f"\n  and {len(reasons) - _SHOWN} more" if len(reasons) > _SHOWN else ""
        raise BrokenImagesError(
            f"{len(reasons)} of {len(names)} images of {where} cannot be used:\n  "
            + "\n  ".join(reasons[:_SHOWN])
            + more,
            fix="repair or remove them, or leave them out: --data.skip_broken true",
        )
    return reasons


def _one_shape(shapes: dict[tuple[int, ...], int], names: Sequence[str], where: object) -> tuple[int, int]:
    """Channels and side that all images share."""
    sizes = {shape[1:]: example for shape, example in reversed(shapes.items())}
    if len(sizes) > 1:
        shown = ", ".join(f"{height} x {width} ({names[i]})" for (height, width), i in list(sizes.items())[-3:])
        raise DataError(
            f"the images of {where} have {len(sizes)} sizes: {shown}",
            fix="say to which one they are brought: --data.image_size 32",
        )
    if len(shapes) > 1:
        shown = ", ".join(f"{'grey' if shape[0] == 1 else 'colour'} ({names[i]})" for shape, i in shapes.items())
        raise DataError(
            f"the images of {where} are grey and colour: {shown}", fix="give --data.channels 1 or --data.channels 3"
        )
    channels, height, width = next(iter(shapes))
    if height != width:
        raise DataError(
            f"the images of {where} are {height} x {width}, not square",
            fix="say to which side they are brought: --data.image_size 32",
        )
    return channels, height
