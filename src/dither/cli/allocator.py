"""The C allocator of a process that is dither's own.

By default glibc gives large blocks back to the kernel as soon as they are freed, and gets fresh pages for the next
layer's activations. Each page then costs a fault. Told to keep them, it uses the same pages again. No value changes.
"""

from __future__ import annotations

import ctypes
import os
import sys

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # malloc.h of glibc
_LARGEST = 1 << 30  # bytes; larger blocks still come and go one by one
_AT_A_TIME = 64 << 20  # bytes asked from the kernel together
_USERS_CHOICE = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


def keep_memory() -> bool:
    """Have this process keep freed memory for its next use, up to its own peak; returns whether it does.

    Nothing happens without glibc, or where the environment says how the allocator should behave (man mallopt).
    """
    if sys.platform != "linux" or any(name in os.environ for name in _USERS_CHOICE):
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return False
    wanted = ((_M_TRIM_THRESHOLD, -1), (_M_TOP_PAD, _AT_A_TIME), (_M_MMAP_THRESHOLD, _LARGEST))
    return all(libc.mallopt(name, value) == 1 for name, value in wanted)
