"""Parameters that are expanded over the examples: class tokens, and positions added to a whole batch.

Row i of `token.expand(B, -1, -1)` is the token, and where it meets example i alone its output gradient is all that the
token's gradient for example i consists of. So it is taken from each example's own rows, (B, T, D), where masking the
other examples away would form (B, B, T, D). Legend: B examples, T rows, D features.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from dither.capture.uses import ParamUse


@dataclass(frozen=True)
class Expansion:
    """What a computed tensor was expanded from, along the axis that meets the examples.

    Attributes:
        axis: the axis of the computed tensor that meets the examples' axis of the output, entry by entry.
        shape: of what was expanded.
        base: where its gradient goes: a parameter, or a place in the graph of what is computed from parameters.
    """

    axis: int
    shape: torch.Size
    base: Tensor | GradientEdge

    def per_example_gradient(self, use: ParamUse, grad_output: Tensor) -> Tensor:
        """Each example's gradient of what was expanded, (B, *shape)."""
        entries = use.rule.own_entries(use, grad_output)
        layout = replace(use.examples, axis=self.axis)
        rows = layout.split(entries).sum((self.axis + 1, self.axis + 2)).unsqueeze(self.axis + 1)
        leading = (1,) * (entries.dim() - len(self.shape))
        return rows.sum_to_size(use.batch, *leading, *self.shape).reshape(use.batch, *self.shape)


def expansion_of(use: ParamUse) -> Expansion | None:
    """How the tensor of a use was expanded over the examples; None unless that and whose rows are whose is certain."""
    computed, node = use.parameter, use.parameter.grad_fn
    if (
        use.axis is None
        or use.batch < 2
        or node is None
        or node.name() != "ExpandBackward0"
        or computed._backward_hooks
    ):
        return None
    axis: int | None = use.rule.own_axis(use)
    if axis is None:
        return None
    saved: Any = node
    shape = torch.Size(int(size) for size in saved._saved_self_sym_sizes)
    leading = computed.dim() - len(shape)
    if axis >= leading and shape[axis - leading] != 1:
        return None
    parent, output = node.next_functions[0]
    if parent is None:
        return None
    leaf: Tensor | None = getattr(parent, "variable", None)
    return Expansion(axis, shape, GradientEdge(parent, output) if leaf is None else leaf)
