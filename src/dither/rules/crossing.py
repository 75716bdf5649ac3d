"""Several uses of one parameter: the norm of the sum of their gradients, without forming it.

A use whose gradient for an example is a sum over rows of left_t right_t^T gives its rows. Of several uses all rows
count as one longer list, so that |G|^2 = sum over rows t, s of (left_t . left_s)(right_t . right_s), which is the
ghost norm (Li et al. 2022, arXiv:2110.05679, section 4) with the products of different uses in it. The left factor of a
looked-up row is a unit vector, given by its index. Legend: B examples, T rows, a parameter of V rows of d entries.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement

import torch
from torch import Tensor

GRAM_ELEMENTS = 1 << 24
"""Largest block of Gram matrices kept at once, in elements."""

CANCELLED = 0.05
"""A sum of Gram products below this share of their root sum of squares is not exact enough."""

VANISHING = 1e-30
"""Squared norms below this may have lost products that float32 cannot hold: they are taken another way."""


def gram_rows(batch: int, rows: int) -> int:
    """Rows of a block of symmetric Gram matrices: near the fastest of those measured, and bounded in memory."""
    fast = 8 * math.ceil(math.sqrt(rows) / 2)
    return max(1, min(fast, GRAM_ELEMENTS // max(1, batch * rows)))


@dataclass(frozen=True)
class RowFactors:
    """The rows of a use's per-example gradients.

    Attributes:
        left: (B, T, V); or (B, T) int64, the index of a unit vector.
        right: (B, T, d).
    """

    left: Tensor
    right: Tensor

    @property
    def looked_up(self) -> bool:
        """Whether the left factors are unit vectors."""
        return self.left.dim() == 2

    def block(self, start: int, stop: int) -> RowFactors:
        """Some of the rows."""
        return RowFactors(self.left[:, start:stop], self.right[:, start:stop])


def crossed_norm(uses: Sequence[RowFactors]) -> Tensor | None:
    """Squared norm of the sum of the uses' gradients, (B,), in float32 or wider.

    None where it is small against its terms, or vanishes: then the uses cancel, or float32 cannot hold their products,
    and norm and sum would not round alike.
    """
    total, terms = _totals(_joined(uses))
    return None if bool(((total < CANCELLED * terms) | (total < VANISHING)).any()) else total


def _joined(uses: Sequence[RowFactors]) -> list[RowFactors]:
    """One list of rows with unit vectors and one with others, whichever there are."""
    joined = []
    for looked_up in (True, False):
        chosen = [rows for rows in uses if rows.looked_up == looked_up]
        if chosen:
            wide = torch.float32
            for rows in chosen:
                wide = torch.promote_types(wide, rows.right.dtype)
                wide = wide if looked_up else torch.promote_types(wide, rows.left.dtype)
            lefts = [rows.left if looked_up else rows.left.to(wide) for rows in chosen]
            rights = [rows.right.to(wide) for rows in chosen]
            joined.append(RowFactors(*(rows[0] if len(rows) == 1 else torch.cat(rows, 1) for rows in (lefts, rights))))
    return joined


def _totals(lists: Sequence[RowFactors]) -> tuple[Tensor, Tensor]:
    """The sum of all products, and the root of the sum of their squares, both (B,)."""
    first = lists[0].right
    total, squares = first.new_zeros(len(first)), first.new_zeros(len(first))
    for one, other in combinations_with_replacement(lists, 2):
        rows, columns = one.right.shape[1], other.right.shape[1]
        step = gram_rows(len(first), rows) if one is other else max(1, GRAM_ELEMENTS // max(1, len(first) * columns))
        for start in range(0, rows, step):
            part = one.block(start, start + step)
            if one is not other:
                _add_products(part, other, 2.0, total, squares)
                continue
            # The products are symmetric: of each block of rows, the part left of the diagonal block counts twice.
            _add_products(part, part, 1.0, total, squares)
            if start:
                _add_products(part, other.block(0, start), 2.0, total, squares)
    return total, squares.sqrt()


def _add_products(one: RowFactors, other: RowFactors, times: float, total: Tensor, squares: Tensor) -> None:
    products = torch.bmm(one.right, other.right.mT.to(one.right.dtype)) * _left_products(one, other)
    total += times * products.sum((1, 2))
    squares += times * products.square().sum((1, 2))


def _left_products(one: RowFactors, other: RowFactors) -> Tensor:
    """Inner products of left factors, (B, T of one, T of the other)."""
    if one.looked_up and other.looked_up:
        return one.left.unsqueeze(2) == other.left.unsqueeze(1)
    if one.looked_up:
        return _entries(other.left, one.left).mT
    if other.looked_up:
        return _entries(one.left, other.left)
    return torch.bmm(one.left, other.left.mT)


def _entries(left: Tensor, indices: Tensor) -> Tensor:
    """Entries (B, T, S) of left factors (B, T, V) at indices (B, S)."""
    return left.gather(2, indices.unsqueeze(1).expand(-1, left.shape[1], -1))
