"""The allocator's setting, in a process of its own: pages are used again, and the user's choice stands."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from dither.cli.allocator import keep_memory

pytestmark = pytest.mark.skipif(
    not hasattr(os, "confstr") or "CS_GNU_LIBC_VERSION" not in os.confstr_names, reason="needs glibc"
)

PROGRAM = """
import ctypes, resource, sys
from dither.cli.allocator import keep_memory
kept = keep_memory() if sys.argv[1] == "keep" else None
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
def use():
    block = libc.malloc(48 << 20)
    ctypes.memset(block, 1, 48 << 20)
    libc.free(block)
use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    use()
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(word: str) -> tuple[str, int]:
    """Whether memory is kept, and page faults of writing 48 MB five times."""
    said = subprocess.run([sys.executable, "-c", PROGRAM, word], capture_output=True, text=True, check=True).stdout
    kept, count = said.split()
    return kept, int(count)


def test_pages_are_used_again():
    kept, count = faults("keep")
    assert kept == "True" and count < 500
    assert faults("leave")[1] > 5000


def test_the_users_choice_stands(monkeypatch):
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "131072")
    assert keep_memory() is False
