"""A random operation on one row of the examples at a time, each with the same random numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dither.capture.randomness import DrawnFrom
from dither.capture.uses import tensors_in
from dither.errors import UnsupportedOpError


def shared_rows(args: Any, kinds: Mapping[int, Any]) -> int:
    """Length of the first axis, which all inputs that are not parameters must share, and no parameter."""
    sizes = {t.shape[0] if t.dim() else 0 for t in tensors_in(args) if id(t) not in kinds}
    others = {t.shape[0] if t.dim() else 0 for t in tensors_in(args) if id(t) in kinds}
    if len(sizes) != 1 or sizes & others - {1}:
        raise UnsupportedOpError(
            f"randomness='same' cannot take one row of {sizes} at a time beside parameters of {others}.",
            fix="randomness='different', or a parameter whose first axis is not the batch's",
        )
    return sizes.pop()


def row_by_row(func: Any, args: Any, kwargs: Any, examples: Mapping[int, Tensor], drawn_from: DrawnFrom) -> Tensor:
    """A random operation on one row of the examples at a time, each with the same random numbers."""
    outputs = []
    for row in range(len(next(iter(examples.values())))):
        drawn_from.restore()
        outputs.append(func(*[examples[id(a)][row : row + 1] if id(a) in examples else a for a in args], **kwargs))
    return torch.cat(outputs)
