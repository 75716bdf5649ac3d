"""Device kernels for CUDA, written in Triton. A leaf: it imports nothing of dither, so rules may use it.

Rules ask `serve` first and keep their own way, the kernels' CPU twin, for what it declines: a CPU, float64, complex
numbers, GPUs older than compute capability 8.0, machines without Triton. Triton itself is imported at the first use.
TRITON_INTERPRET=1, set before dither is imported, runs the kernels on CPU tensors in Triton's interpreter.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def serve(*tensors: Tensor) -> bool:
    """Whether the kernels take these tensors; if not, the caller goes the ordinary way."""
    if not (tensors[0].is_cuda or _INTERPRETED):
        return False
    device = tensors[0].device
    return _runs_on(device) and all(t.device == device and _readable(t) for t in tensors)


def _readable(tensor: Tensor) -> bool:
    """Whether the tensor's memory holds its numbers as they are."""
    return (
        type(tensor) in (Tensor, torch.nn.Parameter)  # others have a memory, or a dispatch, of their own
        and tensor.layout is torch.strided
        and tensor.dtype in _DTYPES
        and tensor.numel() > 0
        and not tensor.is_neg()
        and not torch._is_zerotensor(tensor)
    )


@functools.cache
def _runs_on(device: torch.device) -> bool:
    if importlib.util.find_spec("triton") is None:
        return False
    if _INTERPRETED:
        return device.type == "cpu"
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)


def tile_norm(x_BTd: Tensor, g_BTp: Tensor) -> Tensor:
    """Squared norm (B,) of each g^T x, in tiles on chip; see dither.kernels.linear."""
    from dither.kernels import linear

    with _on(x_BTd.device):
        return linear.tile_norm(x_BTd, g_BTp)


def convolution_tile_norm(
    x_BKCHW: Tensor,
    g_BKOHW: Tensor,
    taps: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor | None:
    """Squared norm (B,) of each example's convolution weight gradient; see dither.kernels.convolution.

    Options by spatial axis, of which there are one or two. None if an example takes more than 2**31 elements.
    """
    from dither.kernels import convolution

    if x_BKCHW.dim() == 4:
        x_BKCHW, g_BKOHW = x_BKCHW.unsqueeze(-2), g_BKOHW.unsqueeze(-2)
        taps, stride, padding, dilation = (1, *taps), (1, *stride), (0, *padding), (1, *dilation)
    if not convolution.fits(x_BKCHW, g_BKOHW):
        return None
    with _on(x_BKCHW.device):
        return convolution.convolution_tile_norm(x_BKCHW, g_BKOHW, taps, stride, padding, dilation, groups)


def add_weighted(held: Tensor, weights: Tensor, into: Tensor, kept: Tensor | None = None) -> None:
    """Add sum_i weights[i] * held[i] over kept examples to `into` in place; `held` has shape (B, *into.shape)."""
    from dither.kernels import rows

    sums = into if into.is_contiguous() else torch.zeros_like(into, memory_format=torch.contiguous_format)
    with _on(held.device):
        rows.add_weighted(_flat(held), weights, sums.view(-1), kept)
    if sums is not into:
        into.add_(sums)


def squared_rows(gradients: Tensor) -> Tensor:
    """Squared norm (B,) of each example's gradient, (B, *shape)."""
    from dither.kernels import rows

    with _on(gradients.device):
        return rows.squared_rows(_flat(gradients))


def _flat(gradients: Tensor) -> Tensor:
    flat = gradients.reshape(gradients.shape[0], math.prod(gradients.shape[1:]))
    return flat if flat.stride(1) == 1 else flat.contiguous()


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
