"""The public label set, and labels checked against it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dither.errors import ConfigurationError, DataError

_SHOWN = 5


def label_set(
    given: Sequence[str] | None, num_classes: int | None, recorded: Sequence[str] | None, where: object
) -> tuple[str, ...]:
    """The names of the classes, never derived from the labels that occur.

    Args:
        given: names the user gave.
        num_classes: number of classes the user gave; they are then called by their numbers.
        recorded: names that the data set's files state.
        where: the data set, for messages.

    Raises:
        ConfigurationError: both were given and differ in number, or a name occurs twice or is empty.
        DataError: neither the user nor the files say what the classes are.
    """
    if given is not None:
        names = tuple(str(name) for name in given)
        if num_classes is not None and num_classes != len(names):
            raise ConfigurationError(
                f"{len(names)} class names and num_classes {num_classes} are given", fix="give one of them"
            )
    elif num_classes is not None:
        if recorded is not None and len(recorded) == num_classes:
            return tuple(recorded)
        names = tuple(str(label) for label in range(num_classes))
    elif recorded is not None:
        names = tuple(recorded)
    else:
        raise DataError(
            f"{where} does not say which classes there are, and the labels that occur are private",
            fix="give the number of classes, --data.num_classes 10, or their names, --data.class_names '[cat, dog]'",
        )
    if not names or len(set(names)) != len(names) or not all(names):
        raise ConfigurationError(f"the class names {list(names)} are not distinct", fix="one name for each class")
    return names


def checked_labels(labels: np.ndarray[Any, Any], count: int, names: Sequence[str], where: object) -> Tensor:
    """Labels as (N,) int64.

    Raises:
        DataError: not one integer in 0..classes - 1 for each of `count` images.
    """
    if labels.shape != (count,):
        raise DataError(
            f"{where} has {count} images and labels of shape {labels.shape}", fix="one label for each image, shape (N,)"
        )
    if labels.dtype.kind not in "iu":
        raise DataError(f"{where} has labels of type {labels.dtype}", fix="store them as integers from 0")
    wrong = np.flatnonzero((labels < 0) | (labels >= len(names)))
    if len(wrong):
        first = ", ".join(f"{labels[i]} (example {i})" for i in wrong[:_SHOWN])
        raise DataError(
            f"{len(wrong)} labels of {where} are outside 0..{len(names) - 1}: {first}",
            fix="give the right --data.num_classes or --data.class_names, or repair the labels",
        )
    return torch.from_numpy(labels.astype(np.int64))
