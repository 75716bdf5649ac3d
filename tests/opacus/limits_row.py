"""A row of the table: a model, its batch and its loss, and what else is done to them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


def nothing(model: nn.Module) -> None:
    """What most rows do to the model around wrapping."""


@dataclass
class Row:
    """One model, its batch and its loss.

    Attributes:
        model: the unwrapped model.
        inputs: the batch; tensors have the examples on axis 0, or on `axes[i]` for the i-th.
        losses: of (model, *inputs): one loss per example, (B,).
        total: the scalar that hooks mode sends back.
        criterion: what ghost mode gives to its loss object, called with (model, *inputs); None for `losses`.
        before: done to the model before it is wrapped.
        after: done to the model after it is wrapped.
        earlier: batches of earlier steps.
        accumulate: whether the earlier batches' gradients are kept for the last step.
        options: of the wrapper.
        axes: where the examples lie in each input, if not on axis 0; None: not per example.
        backward: of (loss): how it is sent back.
        random: leaving an example out changes more than that example: contributions are not measured.
        reference: the losses for the oracle, where the row's own cannot be differentiated one at a time.
        alone: the oracle takes each example in a forward of its own.
    """

    model: nn.Module
    inputs: tuple[Any, ...]
    losses: Callable[..., Tensor]
    total: Callable[[Tensor], Tensor] = Tensor.mean
    criterion: Callable[..., Tensor] | None = None
    before: Callable[[nn.Module], Any] = nothing
    after: Callable[[nn.Module], Any] = nothing
    earlier: list[tuple[Any, ...]] = field(default_factory=list)
    accumulate: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    axes: tuple[int | None, ...] | None = None
    backward: Callable[[Any], None] = lambda loss: loss.backward()
    random: bool = False
    reference: Callable[..., Tensor] | None = None
    alone: bool = False

    def batches(self, kept: Sequence[int] | None) -> list[tuple[Any, ...]]:
        """The steps' batches, of the kept examples only; batches that count besides the last stay whole."""
        cut = [None if self.accumulate else kept for _ in self.earlier] + [kept]
        steps = zip((*self.earlier, self.inputs), cut, strict=True)
        return [tuple(self.keep(i, v, part) for i, v in enumerate(batch)) for batch, part in steps]

    def keep(self, position: int, value: Any, kept: Sequence[int] | None) -> Any:
        """An input of the kept examples only."""
        axis = 0 if self.axes is None else self.axes[position]
        if kept is None or axis is None or not isinstance(value, Tensor):
            return value
        return value.index_select(axis, torch.tensor(kept, dtype=torch.long))


Make = Callable[[], Row]
