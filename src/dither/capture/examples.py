"""Which axis of a tensor carries the examples.

Shapes here: B examples; an axis of size outer * B * inner whose entry r belongs to example (r // inner) % B.
Batch-first rows have outer = 1; time-first rows have inner = 1; both may differ from 1.
"""

from __future__ import annotations

from dataclasses import dataclass, field

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
        certain: whether it was the only layout left; otherwise others say the same of every entry that was reached.
    """

    axis: int
    outer: int
    batch: int
    inner: int
    certain: bool = field(default=True, compare=False)

    @property
    def size(self) -> int:
        """Length of the axis: outer * batch * inner."""
        return self.outer * self.batch * self.inner

    @property
    def one_each(self) -> bool:
        """Whether every example has one entry of the axis, in order."""
        return self.outer == self.inner == 1

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
            raise on_features(tensor)
        if tensor.dim() == 1:
            return tensor.reshape(1, 1, -1)
        if self.axis == 0 and self.outer == 1:
            return tensor.reshape(self.batch, -1, tensor.shape[-1])
        return self.split(tensor).reshape(self.batch, -1, tensor.shape[-1])

    def owners(self, device: torch.device) -> Tensor:
        """The example of each entry of the axis, shape (size,), int64."""
        return (torch.arange(self.size, device=device) // self.inner) % self.batch


@dataclass(frozen=True, eq=False)
class Ragged:
    """Entries of an axis that belong to the examples in no regular order: tokens of an expert, packed sequences.

    Attributes:
        axis: index of the axis in the operation's output.
        batch: B, the number of examples.
        owner: the example of each entry, shape (size,), int64; of an entry that no loss reaches, any.
    """

    axis: int
    batch: int
    owner: Tensor

    outer = 1
    one_each = False

    @property
    def inner(self) -> int:
        """Entries of the example that has most of them."""
        return int(self.owner.bincount(minlength=self.batch).max()) if len(self.owner) else 0

    @property
    def size(self) -> int:
        """Length of the axis."""
        return len(self.owner)

    def split(self, tensor: Tensor) -> Tensor:
        """As `ExampleAxis.split`, with examples of fewer entries filled up with zeros: (B, ..., 1, inner, ...)."""
        order = self.owner.argsort(stable=True).to(tensor.device)
        counts = self.owner.bincount(minlength=self.batch).to(tensor.device)
        places = torch.arange(self.inner, device=tensor.device)
        filled = places < counts.unsqueeze(1)
        first = counts.cumsum(0) - counts
        index = order[(first.unsqueeze(1) + places).clamp(max=max(0, self.size - 1))].flatten()
        gathered = tensor.index_select(self.axis, index).unflatten(self.axis, (self.batch, 1, self.inner))
        mask = filled.view(self.batch, 1, self.inner, *[1] * (tensor.dim() - self.axis - 1))
        return torch.where(mask, gathered, 0).movedim(self.axis, 0)

    def rows(self, tensor: Tensor) -> Tensor:
        """As `ExampleAxis.rows`."""
        if self.axis == tensor.dim() - 1:
            raise on_features(tensor)
        return self.split(tensor).reshape(self.batch, -1, tensor.shape[-1])

    def owners(self, device: torch.device) -> Tensor:
        """The example of each entry of the axis, shape (size,), int64."""
        return self.owner.to(device)


Layout = ExampleAxis | Ragged


def on_features(tensor: Tensor) -> ExampleAxisError:
    """The refusal of examples on the axis that an operation mixes."""
    return ExampleAxisError(
        f"The examples lie on the feature axis of an operation's output, shape {tuple(tensor.shape)}.",
        fix="move the examples to another axis before the operation",
    )


def owners_from_bits(bits: list[tuple[Tensor, Tensor]], axis: int, batch: int) -> Ragged | None:
    """The owner of each entry of an axis, if each is reached by one example alone.

    Args:
        bits: for each bit of the examples' indices, the entries that losses reach whose index has the bit set, and
            those that the others reach; bool, the output's shape.
        axis: the axis.
        batch: B.
    """
    others = [a for a in range(bits[0][0].dim()) if a != axis]
    owner = torch.zeros(bits[0][0].shape[axis], dtype=torch.int64, device=bits[0][0].device)
    for bit, both in enumerate(bits):
        ones, zeros = (touched.any(dim=others) if others else touched for touched in both)
        if bool((ones & zeros).any()):
            return None
        owner += ones.long() << bit
    return Ragged(axis, batch, owner) if bool((owner < batch).all()) else None


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
