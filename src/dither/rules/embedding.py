"""Embedding tables: each example's gradient adds the output gradient's rows at the example's ids.

The norm groups each example's rows by id, so the (B, V, d) gradient is never formed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dither.capture.uses import ParamUse
from dither.errors import UnsupportedOpError
from dither.rules.rule import Cost, Rule, register_rule, squared_rows


class EmbeddingWeight(Rule):
    """Weight (V, d) of `F.embedding`, ids of any rank."""

    holds_cheaply = False

    def claims(self, operands: Mapping[str, Any], slot: str) -> bool:
        """Refuse options that couple examples or change the weight."""
        for option, why in (
            ("scale_grad_by_freq", "divides gradients by counts over the whole batch"),
            ("max_norm", "changes the weight in place during the forward"),
        ):
            if operands.get(option):
                raise UnsupportedOpError(f"An embedding with {option} {why}.", fix=f"build it without {option}")
        return True

    def _rows(self, use: ParamUse, grad_output: Tensor) -> tuple[Tensor, Tensor]:
        """Ids (B, T) and gradient rows (B, T, d); rows of the padding id are zero."""
        ids = use.operand("input")
        g_BTd = use.examples.rows(grad_output)
        ids_BT = use.examples.rows(ids.unsqueeze(-1)).squeeze(-1)
        padding = use.operand("padding_idx")
        if padding is not None:
            padding = padding % use.parameter.shape[0]
            g_BTd = g_BTd.masked_fill((ids_BT == padding).unsqueeze(-1), 0)
        return ids_BT, g_BTd

    def per_example_gradient(self, use: ParamUse, grad_output: Tensor, out: Tensor | None = None) -> Tensor:
        """Shape (B, V, d)."""
        ids, g = self._rows(use, grad_output)
        batch, vocabulary = ids.shape[0], use.parameter.shape[0]
        table = g.new_zeros(batch * vocabulary, g.shape[-1])
        places = ids + torch.arange(batch, device=ids.device).unsqueeze(1) * vocabulary
        table.index_add_(0, places.flatten(), g.flatten(0, 1))
        return table.view(batch, vocabulary, -1)

    def squared_norm(self, use: ParamUse, grad_output: Tensor) -> Tensor:
        """Add rows of equal ids within an example, then square."""
        ids, g = self._rows(use, grad_output)
        g = g.to(torch.promote_types(g.dtype, torch.float32))
        if ids.shape[1] == 1:
            return squared_rows(g)
        batch, vocabulary = ids.shape[0], use.parameter.shape[0]
        keys = ids + torch.arange(batch, device=ids.device).unsqueeze(1) * vocabulary
        unique, place = torch.unique(keys, return_inverse=True)
        merged = g.new_zeros(unique.numel(), g.shape[-1]).index_add_(0, place.flatten(), g.flatten(0, 1))
        owners = torch.div(unique, vocabulary, rounding_mode="floor")
        return g.new_zeros(batch).index_add_(0, owners, squared_rows(merged))

    def add_weighted_sum(self, use: ParamUse, grad_output: Tensor, weights: Tensor, into: Tensor) -> None:
        """One scatter-add of weighted rows."""
        ids, g = self._rows(use, grad_output)
        rows = (g * weights.to(g.dtype).view(-1, 1, 1)).flatten(0, 1).to(into.dtype)
        into.index_add_(0, ids.flatten(), rows)

    def cost(self, use: ParamUse) -> Cost:
        """Work follows the rows; holding would cost the whole table per example."""
        rows = float(use.operand("input").numel() * use.parameter.shape[1])
        held = float(use.batch * use.parameter.numel() * use.parameter.element_size())
        return Cost(held, rows, held)


register_rule(
    F.embedding,
    ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse"),
    {"weight": EmbeddingWeight()},
)
