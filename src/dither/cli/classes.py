"""Labels of one data set as those of another, by the names of their classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dither.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor


def labels_among(names: Sequence[str], labels: Tensor, theirs: Sequence[str], where: object) -> Tensor:
    """The labels' places among other names of the same classes.

    Args:
        names: of the classes that the labels become, in their order.
        labels: (N,) int64, places in `theirs`.
        theirs: the names that the labels have now; none, or their numbers, is the same classes in the same order.
        where: whose labels they are, for messages.

    Returns:
        (N,) int64, places in `names`.

    Raises:
        DataError: a class that is not among the names.
    """
    import torch

    names, theirs = tuple(names), tuple(theirs)
    if not theirs or theirs in (names, tuple(str(label) for label in range(len(names)))):
        return labels
    unknown = [name for name in theirs if name not in names]
    if unknown:
        raise DataError(
            f"{where} has the class {unknown[0]!r}; the real images' classes are {', '.join(names)}",
            fix="compare with real images of the same classes: --data.path, --data.class_names",
        )
    return torch.tensor([names.index(name) for name in theirs])[labels]
