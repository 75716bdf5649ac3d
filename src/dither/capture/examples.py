"""Which axis of a tensor carries the examples.

Shapes here: B examples; an axis of size outer * B * inner whose entry r belongs to example (r // inner) % B.
Batch-first rows have outer = 1; time-first rows have inner = 1; both may differ from 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dither.errors import ExampleAxisError


@dataclass(frozen=True)
class ExampleAxis:
    """The axis that carries the examples, and how the examples lie on it.

    Attributes:
        axis: index of the axis in the operation's output.
        outer: how often the run of all examples repeats along the axis.
        batch: B, the number of examples.
        inner: how many consecutive entries belong to one example.
    """

    axis: int
    outer: int
    batch: int
    inner: int

    @property
    def size(self) -> int:
        """Length of the axis: outer * batch * inner."""
        return self.outer * self.batch * self.inner

    def split(self, tensor: Tensor) -> Tensor:
        """Bring the examples to the front.

        Args:
            tensor: shape (..., outer * B * inner, ...) with that size at `axis`.

        Returns:
            Shape (B, ..., outer, inner, ...): a view where the memory allows one.
        """
        unflattened: Tensor = tensor.unflatten(self.axis, (self.outer, self.batch, self.inner))
        return unflattened.movedim(self.axis + 1, 0)

    def rows(self, tensor: Tensor) -> Tensor:
        """Flatten everything but the last axis into each example's rows: shape (B, T, features).

        The last axis must not be the example axis, unless B is 1.
        """
        if self.batch > 1 and self.axis == tensor.dim() - 1:
            raise ExampleAxisError(
                f"The examples lie on the feature axis of an operation's output, shape {tuple(tensor.shape)}.",
                fix="move the examples to another axis before the operation",
            )
        if tensor.dim() == 1:
            return tensor.reshape(1, 1, -1)
        if self.axis == 0 and self.outer == 1:
            return tensor.reshape(self.batch, -1, tensor.shape[-1])
        return self.split(tensor).reshape(self.batch, -1, tensor.shape[-1])

    def owners(self, device: torch.device) -> Tensor:
        """The example of each entry of the axis, shape (size,), int64."""
        return (torch.arange(self.size, device=device) // self.inner) % self.batch


def candidates(shape: torch.Size, batch: int) -> set[ExampleAxis]:
    """Every layout of `batch` examples that an output of this shape admits."""
    found = set()
    for axis, size in enumerate(shape):
        if size == 0 or size % batch:
            continue
        rest = size // batch
        for inner in range(1, rest + 1):
            if rest % inner == 0:
                found.add(ExampleAxis(axis, rest // inner, batch, inner))
    return found


def consistent(layouts: set[ExampleAxis], touched: Tensor, examples: list[int]) -> set[ExampleAxis]:
    """Layouts for which every touched entry belongs to one of `examples`.

    Args:
        layouts: the layouts still possible.
        touched: bool, the output's shape: entries that the examples' losses reach.
        examples: indices of the examples whose losses were sent back.
    """
    kept = set()
    for axis in {layout.axis for layout in layouts}:
        others = [a for a in range(touched.dim()) if a != axis]
        along = touched.any(dim=others) if others else touched
        for layout in (layout for layout in layouts if layout.axis == axis):
            allowed = torch.zeros(layout.batch, dtype=torch.bool, device=touched.device)
            allowed[examples] = True
            if not bool((along & ~allowed[layout.owners(touched.device)]).any()):
                kept.add(layout)
    return kept
