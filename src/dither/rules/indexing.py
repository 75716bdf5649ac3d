"""A parameter from which entries are picked by data: p[ids], index_select, gather, take.

The same operation on the numbers 0, 1, 2, ... tells which entry each output entry is; the gradient is then that of a
table. Where whole rows along axis 0 are picked, rows are added instead of entries.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dither.capture.uses import ParamUse
from dither.rules.embedding import Lookup, Scattered, owners_of_rows
from dither.rules.rule import register_rule


class Picked(Lookup):
    """A parameter that is indexed by data, by any operation that only picks entries.

    Args:
        index: name of the operand that picks rows along axis 0 when `axis` is absent or 0.
        axis: name of the operand that says along which axis; None if there is none.
        rows: whether the operation can pick whole rows.
    """

    def __init__(self, index: str = "index", axis: str | None = None, rows: bool = False) -> None:
        self.index, self.axis, self.rows = index, axis, rows

    def claims(self, operands: Mapping[str, Any], slot: str) -> bool:
        """Whenever nothing is written into a given tensor."""
        return operands.get("out") is None

    def scattered(self, use: ParamUse, grad_output: Tensor) -> Scattered:
        """Whole rows if they are picked by one index tensor, otherwise single entries."""
        shape = use.parameter.shape
        index = self._row_index(use)
        along_rows = use.batch == 1 or (index is not None and use.examples.axis < index.dim())
        if index is not None and along_rows:
            index = torch.where(index < 0, index + shape[0], index)
            rows = grad_output.reshape(index.numel(), shape[1:].numel())
            return Scattered(owners_of_rows(use, index, grad_output), index.flatten(), rows, shape[0])
        ids = self._entries(use)
        rows = grad_output.reshape(ids.numel(), 1)
        return Scattered(owners_of_rows(use, ids, grad_output), ids.flatten(), rows, shape.numel())

    def _row_index(self, use: ParamUse) -> Tensor | None:
        """The index tensor, if it picks whole rows along axis 0."""
        index = use.operand(self.index)
        if isinstance(index, tuple) and all(_is_everything(i) for i in index[1:]):
            index = index[0] if index else None
        by_rows = self.rows and isinstance(index, Tensor) and index.dtype != torch.bool and index.dtype != torch.uint8
        if not by_rows or (self.axis is not None and use.operand(self.axis) != 0):
            return None
        return index  # type: ignore[no-any-return]

    def _entries(self, use: ParamUse) -> Tensor:
        """The number of the parameter's entry that each output entry is."""
        operand = use.operand("input")
        numbers = torch.arange(operand.numel(), device=operand.device).view(operand.shape)
        call = use.call
        args = [numbers if argument is operand else argument for argument in call.args]
        kwargs = {name: numbers if argument is operand else argument for name, argument in call.kwargs.items()}
        picked: Tensor = call.function(*args, **kwargs)
        return picked


def _is_everything(index: Any) -> bool:
    return index is Ellipsis or (isinstance(index, slice) and index == slice(None))


register_rule(torch.Tensor.__getitem__, ("input", "indices"), {"input": Picked("indices", rows=True)})
register_rule(
    (torch.index_select, torch.Tensor.index_select),
    ("input", "dim", "index"),
    {"input": Picked("index", axis="dim", rows=True)},
)
register_rule((torch.gather, torch.Tensor.gather), ("input", "dim", "index", "sparse_grad"), {"input": Picked()})
register_rule((torch.take, torch.Tensor.take), ("input", "index"), {"input": Picked()})
register_rule(
    (torch.take_along_dim, torch.Tensor.take_along_dim), ("input", "indices", "dim"), {"input": Picked("indices")}
)
register_rule((torch.masked_select, torch.Tensor.masked_select), ("input", "mask"), {"input": Picked("mask")})
