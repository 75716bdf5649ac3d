"""Places in the graph: nodes for fresh outputs and inputs, whose gradients are delivered."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.grad_mode import _unsafe_preserve_version_counter


class _Anchor(torch.autograd.Function):
    """A graph node for a fresh output, without a copy, so that in-place operations after it keep working."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, output: Tensor) -> Tensor:
        ctx.mark_dirty(output)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None]:
        return None, None


anchored = _Anchor.apply
"""Bound now: while recording, `torch.autograd.Function.apply` is watched."""


def after_tensor_hooks(tensor: Tensor, deliver: Callable[[Tensor], None]) -> None:
    """Deliver a tensor's gradient once every hook that anybody registers on the tensor has run."""
    number = tensor.output_nr

    def hook(gradients: tuple[Tensor | None, ...]) -> None:
        gradient = gradients[number]
        if gradient is not None:
            deliver(gradient)

    assert tensor.grad_fn is not None
    tensor.grad_fn.register_prehook(hook)


def alias(tensor: Tensor, anchor: Tensor, deliver: Callable[[Tensor], None]) -> Tensor:
    """The same memory as a tensor that has a graph node, whose gradients are delivered."""
    with _unsafe_preserve_version_counter(tensor):  # nothing is written
        tracked: Tensor = anchored(anchor, tensor.detach())
    after_tensor_hooks(tracked, deliver)
    return tracked
