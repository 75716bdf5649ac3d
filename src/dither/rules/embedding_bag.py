"""Bags of embeddings, summed or averaged: each id of a bag receives the bag's output gradient, scaled."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dither.capture.uses import ParamUse
from dither.errors import UnsupportedOpError
from dither.rules.embedding import Lookup, Scattered, refuse_coupling
from dither.rules.rule import Rule, register_rule


class BagWeight(Lookup):
    """Weight (V, d) of `F.embedding_bag` in modes sum and mean; max is left to the fallback."""

    def claims(self, operands: Mapping[str, Any], slot: str) -> bool:
        """Modes whose gradient does not depend on the table; refuse what has no gradient to follow."""
        refuse_coupling(operands)
        ids = operands["input"].numel()
        end = int(operands["offsets"][-1]) if operands.get("include_last_offset") else ids
        if end != ids:
            # torch's kernels disagree on the ids that are left (2.14: float64 takes them into the last bag, float32
            # leaves them out), and backward reads memory that forward did not write.
            raise UnsupportedOpError(
                f"The last bag of an embedding_bag ends at {end}, before the last of {ids} ids.",
                fix="pass only the ids that are in a bag",
            )
        return operands.get("mode", "mean") in ("sum", "mean")

    def scattered(self, use: ParamUse, grad_output: Tensor) -> Scattered:
        """One row for each id, the output gradient of its bag."""
        ids = use.operand("input").flatten().long()
        bags, counts = self._bags(use, grad_output.shape[0])
        scale = self._scale(use, ids, bags, counts, grad_output)
        rows = grad_output[bags] if scale is None else grad_output[bags] * scale.unsqueeze(1)
        owners = torch.zeros_like(bags) if use.batch == 1 else use.examples.owners(ids.device)[bags]
        return Scattered(owners, ids, rows, use.parameter.shape[0]).masked(use.operand("padding_idx"))

    def _bags(self, use: ParamUse, bags: int) -> tuple[Tensor, Tensor]:
        """The bag of each id, (n,), and each bag's number of ids."""
        ids, offsets = use.operand("input"), use.operand("offsets")
        if ids.dim() == 2:
            counts = torch.full((bags,), ids.shape[1], device=ids.device)
        else:
            ends = torch.cat([offsets[1:bags], offsets.new_tensor([ids.numel()])]) if bags else offsets
            counts = ends - offsets[:bags]
        return torch.repeat_interleave(torch.arange(bags, device=ids.device), counts), counts

    def _scale(self, use: ParamUse, ids: Tensor, bags: Tensor, counts: Tensor, like: Tensor) -> Tensor | None:
        """What each id's row was multiplied by: its own weight, or one over the ids of its bag that are not padding."""
        weights, padding = use.operand("per_sample_weights"), use.operand("padding_idx")
        if weights is not None:
            own: Tensor = weights.flatten().to(like.dtype)
            return own
        if use.operand("mode") == "sum":
            return None
        if padding is not None:
            padded = (ids == padding % use.parameter.shape[0]).to(counts.dtype)
            counts = counts.index_add(0, bags, -padded)
        return counts.clamp(min=1).to(like.dtype).reciprocal()[bags]


class PlainBagWeight(Rule):
    """Weight of `torch.embedding_bag`, whose product is the fallback's: only options that couple are looked for."""

    def claims(self, operands: Mapping[str, Any], slot: str) -> bool:
        """Refuse options that couple examples."""
        refuse_coupling(operands)
        return False


register_rule(torch.embedding_bag, ("weight", "input", "offsets", "scale_grad_by_freq"), {"weight": PlainBagWeight()})
register_rule(
    F.embedding_bag,
    (
        "input",
        "weight",
        "offsets",
        "max_norm",
        "norm_type",
        "scale_grad_by_freq",
        "mode",
        "sparse",
        "per_sample_weights",
        "include_last_offset",
        "padding_idx",
    ),
    {"weight": BagWeight()},
)
