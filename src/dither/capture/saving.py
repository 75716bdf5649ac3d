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
    kept = _kept_by(anchor, *tensors)  # torch 2.6 lets go of what a node saved with the node's output
    return lambda: tuple(kept.grad_fn.saved_tensors)


_hooks: Any = torch._C._autograd
_top = getattr(_hooks, "_top_saved_tensors_default_hooks", None)
"""Gives the innermost hooks, or None; torch 2.6 has no such function."""


def hooked() -> bool:
    """Whether saved-tensor hooks are active."""
    return _refuse_to_be_disabled() if _top is None else _top(False) is not None


def _refuse_to_be_disabled() -> bool:
    """The same, asked of torch 2.6: it raises where they are active, and else is put back as it was."""
    message = _hooks._saved_tensors_hooks_get_disabled_error_message()
    try:
        _hooks._saved_tensors_hooks_disable("")
    except RuntimeError:
        return True
    finally:
        if message is None:
            _hooks._saved_tensors_hooks_enable()
        else:
            _hooks._saved_tensors_hooks_disable(message)
    return False
