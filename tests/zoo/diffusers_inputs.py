"""What the denoisers of diffusers are given, and how one is registered."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from dither.capture.uses import tensors_in
from zoo import B, denoising, entry

HEADS = {"num_attention_heads": 2, "attention_head_dim": 8}
LATENT = {"in_channels": 4, "out_channels": 4}


def text(length: int = 5, width: int = 12) -> torch.Tensor:
    """An encoded prompt (B, length, width)."""
    return torch.randn(B, length, width)


def attended(length: int = 5) -> torch.Tensor:
    """A mask (B, length) of the prompt; the second example's is shorter."""
    mask = torch.ones(B, length, dtype=torch.long)
    mask[1, 3:] = 0
    return mask


def video(channels: int = 4, frames: int = 2, size: int = 8) -> torch.Tensor:
    """(B, channels, frames, size, size)."""
    return torch.randn(B, channels, frames, size, size)


def first(outputs: Any) -> Any:
    """The denoised sample."""
    return outputs[0]


def every(outputs: Any) -> list[torch.Tensor]:
    """All the tensors of nested outputs: what a ControlNet adds to each block."""
    return list(tensors_in(outputs))


def register(
    name: str,
    inputs: str,
    model: Callable[[], nn.Module],
    given: Callable[[], dict[str, Any]],
    outputs: Callable[[Any], Any] = first,
    **options: Any,
) -> None:
    """Register a denoiser: how to make it, its forward's keyword arguments, and what the loss sees of its output."""

    @entry("diffusers", name, inputs, **options)
    def build():
        made, arguments = model(), given()
        return made, denoising(lambda: outputs(made(**arguments, return_dict=False)))
