"""Block sizes of the kernels, by GPU generation, dtype and shape class.

Chosen by what the compiler reports (registers, shared memory, no spills; `python benchmarks/kernels_aot.py` prints it)
and by reasoning about reuse. NOT measured on a GPU. Override an entry by assigning to `TABLE`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tiles:
    """Block sizes of one kernel.

    Attributes:
        rows: rows taken at a time in the sum over rows, positions or examples.
        p: the tile's output features, or 1.
        d: the tile's input features, taps or columns.
        warps: warps a program.
        stages: loads kept in flight.
    """

    rows: int
    p: int
    d: int
    warps: int
    stages: int


SM80, SM90 = 80, 90
"""Generations with entries: SM80 fits 99 KiB of shared memory (8.0 to 8.9, 12.x), SM90 227 KiB (9.0, 10.x)."""

TABLE: dict[tuple[int, torch.dtype, str], Tiles] = {}

for _half in (torch.bfloat16, torch.float16):
    # A 128 x 128 tile reads 1/64 of an element a multiply-add. 64 rows at a time feed the warp groups of SM90.
    TABLE[SM80, _half, "linear large"] = Tiles(32, 128, 128, 8, 4)
    TABLE[SM90, _half, "linear large"] = Tiles(64, 128, 128, 8, 4)
    # Gathered loads go through registers, which a smaller tile leaves free.
    TABLE[SM80, _half, "convolution large"] = Tiles(32, 64, 64, 4, 2)
    TABLE[SM90, _half, "convolution large"] = Tiles(32, 64, 64, 4, 2)
    for _sm in (SM80, SM90):
        TABLE[_sm, _half, "linear medium"] = Tiles(64, 64, 64, 4, 3)
        TABLE[_sm, _half, "linear skinny"] = Tiles(64, 128, 16, 4, 3)
        TABLE[_sm, _half, "convolution small"] = Tiles(32, 32, 32, 4, 2)
        TABLE[_sm, _half, "weighted sum"] = Tiles(8, 1, 512, 4, 1)
        TABLE[_sm, _half, "squares"] = Tiles(8, 1, 2048, 4, 1)
for _sm in (SM80, SM90):
    # Exact float32 products run on the ordinary cores: operands live in registers, so tiles are smaller.
    TABLE[_sm, torch.float32, "linear large"] = Tiles(16 if _sm == SM80 else 32, 64, 64, 4, 3)
    TABLE[_sm, torch.float32, "linear medium"] = Tiles(16 if _sm == SM80 else 32, 64, 64, 4, 3)
    TABLE[_sm, torch.float32, "linear skinny"] = Tiles(16, 128, 16, 4, 3)
    TABLE[_sm, torch.float32, "convolution large"] = Tiles(16, 64, 64, 8, 2)
    TABLE[_sm, torch.float32, "convolution small"] = Tiles(16, 32, 32, 4, 2)
    TABLE[_sm, torch.float32, "weighted sum"] = Tiles(8, 1, 512, 4, 1)
    TABLE[_sm, torch.float32, "squares"] = Tiles(8, 1, 2048, 4, 1)


def generation(device: torch.device) -> int:
    """SM80 or SM90, whichever the device can run; SM80 for a CPU (Triton's interpreter)."""
    if device.type != "cuda":
        return SM80
    return SM90 if torch.cuda.get_device_capability(device)[0] in (9, 10) else SM80


def linear_class(x_BTd: Tensor, g_BTp: Tensor) -> str:
    """Shape class of (p, d) gradients, p >= d."""
    d = x_BTd.shape[-1]
    if d <= 32:
        return "linear skinny"
    return "linear large" if d >= 128 and _copies(x_BTd) and _copies(g_BTp) else "linear medium"


def _copies(rows_BTn: Tensor) -> bool:
    """Whether 16 bytes at a time can be copied to shared memory; otherwise loads take registers from the tile."""
    *outer, step = rows_BTn.stride()
    return step == 1 and not any(size % 16 for size in (rows_BTn.shape[-1], rows_BTn.data_ptr(), *outer))


def convolution_class(p: int, taps: int) -> str:
    """Shape class of a group's (p, taps) gradient."""
    return "convolution large" if min(p, taps) > 32 else "convolution small"


def tiles(device: torch.device, dtype: torch.dtype, shape: str) -> Tiles:
    """The table's entry."""
    return TABLE[generation(device), dtype, shape]
