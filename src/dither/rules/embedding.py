"""Embedding tables and bags: each example's gradient adds rows of output gradient at the example's ids.

The norm groups each example's rows by id, so the (B, V, d) gradient is never formed. Legend: n rows that are looked
up, of all examples; a table of V rows of d entries.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dither.capture.examples import ExampleAxis
from dither.capture.uses import ParamUse
from dither.errors import ExampleAxisError, UnsupportedOpError
from dither.rules.crossing import RowFactors
from dither.rules.rule import Cost, Rule, at_least_float32, cancels, register_rule, squared_rows


@dataclass(frozen=True)
class Scattered:
    """Rows of gradient and where they belong.

    Attributes:
        owners: (n,) the example of each row, int64.
        ids: (n,) the table's row that it is added to, int64.
        rows: (n, d).
        vocabulary: V, the table's number of rows.
    """

    owners: Tensor
    ids: Tensor
    rows: Tensor
    vocabulary: int

    def masked(self, padding: int | None) -> Scattered:
        """The same with rows of the padding id, counted from the end if negative, set to zero."""
        if padding is None:
            return self
        padded = (self.ids == padding % self.vocabulary).unsqueeze(1)
        return Scattered(self.owners, self.ids, self.rows.masked_fill(padded, 0), self.vocabulary)


class Lookup(Rule):
    """A parameter whose rows are looked up; a subclass says which, by `scattered`."""

    holds_cheaply = False

    def scattered(self, use: ParamUse, grad_output: Tensor) -> Scattered:
        """The rows of gradient and where they belong."""
        raise NotImplementedError

    def per_example_gradient(self, use: ParamUse, grad_output: Tensor, out: Tensor | None = None) -> Tensor:
        """Shape (B, V, d), as the parameter's own."""
        found = self.scattered(use, grad_output)
        table = found.rows.new_zeros(use.batch * found.vocabulary, found.rows.shape[1])
        table.index_add_(0, found.ids + found.owners * found.vocabulary, found.rows)
        return table.view(use.batch, *use.parameter.shape)

    def squared_norm(self, use: ParamUse, grad_output: Tensor) -> Tensor | None:
        """Add rows of equal ids within an example, then square."""
        found = self.scattered(use, grad_output)
        rows = found.rows.to(at_least_float32(found.rows.dtype))
        owners = found.owners
        several = len(owners) > use.batch or bool((torch.bincount(owners, minlength=use.batch) > 1).any())
        terms = _by_owner(rows, owners, use.batch) if several else None
        if several:
            unique, place = torch.unique(found.ids + owners * found.vocabulary, return_inverse=True)
            rows = rows.new_zeros(unique.numel(), rows.shape[1]).index_add_(0, place, rows)
            owners = torch.div(unique, found.vocabulary, rounding_mode="floor")
        squared = _by_owner(rows, owners, use.batch)
        return None if terms is not None and cancels(squared, terms, rows.dtype) else squared

    def add_weighted_sum(self, use: ParamUse, grad_output: Tensor, weights: Tensor, into: Tensor) -> None:
        """One scatter-add of weighted rows."""
        found = self.scattered(use, grad_output)
        rows = found.rows * weights.to(at_least_float32(found.rows.dtype))[found.owners].unsqueeze(1)
        if into.is_contiguous():
            into.view(found.vocabulary, -1).index_add_(0, found.ids, rows.to(into.dtype))
        else:
            total = into.new_zeros(found.vocabulary, rows.shape[1]).index_add_(0, found.ids, rows.to(into.dtype))
            into.add_(total.view(into.shape))

    def cost(self, use: ParamUse) -> Cost:
        """Work follows the rows; holding would cost the whole table per example."""
        held = float(use.batch * use.parameter.numel() * use.parameter.element_size())
        entries = float(use.call.output_shape.numel())
        return Cost(held, entries, held, entries, 2.0 * entries * use.parameter.element_size())


def _by_owner(rows: Tensor, owners: Tensor, batch: int) -> Tensor:
    """Sum of the squared norms of each example's rows, (B,)."""
    squares = squared_rows(rows)
    return squares.new_zeros(batch).index_add_(0, owners, squares)


class EmbeddingWeight(Lookup):
    """Weight (V, d) of `F.embedding`, ids of any rank."""

    def claims(self, operands: Mapping[str, Any], slot: str) -> bool:
        """Refuse options that couple examples or change the weight."""
        refuse_coupling(operands)
        return True

    def scattered(self, use: ParamUse, grad_output: Tensor) -> Scattered:
        """One row for each id."""
        ids = use.operand("input")
        owners = owners_of_rows(use, ids, grad_output)
        rows = grad_output.reshape(ids.numel(), grad_output.shape[-1])
        return Scattered(owners, ids.flatten(), rows, use.parameter.shape[0]).masked(self._padding(use))

    def _padding(self, use: ParamUse) -> int | None:
        """The id that has no gradient; counted from the end if negative."""
        padding: int | None = use.operand("padding_idx")
        return padding

    def crosses(self, use: ParamUse) -> bool:
        """Where every example has as many ids."""
        return isinstance(use.axis, ExampleAxis) and use.axis.axis < use.operand("input").dim()

    def row_factors(self, use: ParamUse, grad_output: Tensor) -> RowFactors:
        """Ids, and output gradients; of the padding id, zeros."""
        ids = use.examples.split(use.operand("input")).reshape(use.batch, -1)
        rows, padding = use.examples.rows(grad_output), self._padding(use)
        if padding is not None:
            rows = rows.masked_fill((ids == padding % use.parameter.shape[0]).unsqueeze(2), 0)
        return RowFactors(ids.long(), rows)


class PlainEmbeddingWeight(EmbeddingWeight):
    """Weight (V, d) of `torch.embedding`, to which a negative padding id is none."""

    def _padding(self, use: ParamUse) -> int | None:
        padding: int | None = use.operand("padding_idx")
        return None if padding is None or padding < 0 else padding


def refuse_coupling(operands: Mapping[str, Any]) -> None:
    """Raise UnsupportedOpError for options of a table that no per-example gradient can follow."""
    for option, why in (
        ("scale_grad_by_freq", "divides gradients by counts over the whole batch"),
        ("max_norm", "changes the weight in place during the forward"),
    ):
        if operands.get(option):
            raise UnsupportedOpError(f"An embedding with {option} {why}.", fix=f"build it without {option}")


def owners_of_rows(use: ParamUse, ids: Tensor, grad_output: Tensor) -> Tensor:
    """The example of each id, flattened; the output's leading axes are those of the ids."""
    layout = use.examples
    if layout.batch == 1:
        return torch.zeros(ids.numel(), dtype=torch.int64, device=ids.device)
    if layout.axis >= ids.dim():
        raise ExampleAxisError(
            f"The examples lie on the feature axis of an operation's output, shape {tuple(grad_output.shape)}.",
            fix="move the examples to another axis before the operation",
        )
    owners = layout.owners(ids.device).view(-1, *[1] * (ids.dim() - layout.axis - 1))
    return owners.expand(ids.shape).flatten()


register_rule(
    F.embedding,
    ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse"),
    {"weight": EmbeddingWeight()},
)
register_rule(
    torch.embedding,
    ("weight", "input", "padding_idx", "scale_grad_by_freq", "sparse"),
    {"weight": PlainEmbeddingWeight()},
)
