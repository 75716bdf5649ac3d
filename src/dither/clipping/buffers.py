"""Memory for held gradients, kept between steps."""

from __future__ import annotations

import torch
from torch import Tensor

from dither.allocator import reuses


class Buffers:
    """Hands out memory, and keeps it between steps where fresh pages would cost more than the arithmetic."""

    def __init__(self) -> None:
        self._kept: dict[object, Tensor] = {}

    def take(self, key: object, batch: int, parameter: Tensor) -> Tensor:
        """An uninitialised (B, *parameter.shape) tensor.

        The same memory for the same key if it is large enough; fresh where the allocator has what activations left.
        """
        needed = batch * parameter.numel()
        if reuses(parameter.device, needed * parameter.element_size()):
            return parameter.new_empty(batch, *parameter.shape, requires_grad=False)
        kept = self._kept.pop(key, None)  # at once, so that no other thread takes it meanwhile
        fits = kept is not None and kept.numel() >= needed and kept.dtype == parameter.dtype
        if kept is None or not fits or kept.device != parameter.device or _in_use(kept):
            kept = parameter.new_empty(needed, requires_grad=False)
        taken = kept[:needed].view(batch, *parameter.shape)
        self._kept[key] = kept
        return taken


def _in_use(kept: Tensor) -> bool:
    """Whether somebody else (the user's `grad_sample`) still refers to the memory."""
    count = getattr(torch._C, "_storage_Use_Count", None)
    storage = kept.untyped_storage()  # refers to the memory, as the tensor does
    return count is None or count(storage._cdata) > 2
