"""Saved inputs under saved-tensor hooks.

Where hooks are active (an activation checkpoint, `save_on_cpu`), the recorder saves its inputs through autograd as
well, so that they are dropped, or moved, with everything else, and come back in backward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class _Keeper(torch.autograd.Function):
    """A graph node beside the path of the gradients, which saves tensors as any node does."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return anchor.detach().clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise AssertionError("the keeper is not on the path of any gradient")


_kept_by = _Keeper.apply
"""Bound now: while recording, `torch.autograd.Function.apply` is watched."""


def keep(anchor: Tensor, tensors: list[Tensor]) -> Callable[[], tuple[Tensor, ...]]:
    """What gives the tensors back, as the active hooks do; to be asked once a pass."""
    node = _kept_by(anchor, *tensors).grad_fn
    return lambda: tuple(node.saved_tensors)


def hooked() -> bool:
    """Whether saved-tensor hooks are active."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
