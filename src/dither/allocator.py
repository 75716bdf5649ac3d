"""The C allocator of a process, and what it does with memory that was freed.

By default glibc gives large blocks back to the kernel as soon as they are freed, and gets fresh pages for the next
layer's activations. Each page then costs a fault. Told to keep them, it uses the same pages again. No value changes.
dither's own commands ask for it; a program that uses the library may.
"""

from __future__ import annotations

import ctypes
import os
import sys

import torch

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # malloc.h of glibc
LARGEST = 1 << 30
"""Bytes; larger blocks still come and go one by one."""
_AT_A_TIME = 64 << 20  # bytes asked from the kernel together
_kept = False
_USERS_CHOICE = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


def keep_memory() -> bool:
    """Have this process keep freed memory for its next use, up to its own peak.

    Training on a CPU gets faster and its peak lower: held per-example gradients then take the pages that activations
    have left, and nothing is reserved for them between steps. Call it once, before the first step. Memory that other
    code of the process frees stays with the process too.

    Returns:
        Whether it does. Nothing happens without glibc, or where the environment says how the allocator should behave
        (man mallopt).
    """
    global _kept
    if sys.platform != "linux" or any(name in os.environ for name in _USERS_CHOICE):
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return False
    # The threshold first: where the C library refuses it, nothing is changed.
    wanted = ((_M_MMAP_THRESHOLD, LARGEST), (_M_TRIM_THRESHOLD, -1), (_M_TOP_PAD, _AT_A_TIME))
    _kept = all(libc.mallopt(name, value) == 1 for name, value in wanted)
    return _kept


def give_back() -> None:
    """Return to the kernel what was freed until now, where the C library can (glibc's malloc_trim)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def reuses(device: torch.device, size: int) -> bool:
    """Whether a tensor of `size` bytes on the device takes what was freed before: on CUDA it does."""
    return device.type == "cuda" or (device.type == "cpu" and _kept and size < LARGEST)
