"""The allocator's setting, in a process of its own: pages are used again, and the user's choice stands."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from dither.allocator import keep_memory

pytestmark = pytest.mark.skipif(
    not hasattr(os, "confstr") or "CS_GNU_LIBC_VERSION" not in os.confstr_names, reason="needs glibc"
)

PROGRAM = """
import ctypes, resource, sys
from dither.allocator import keep_memory
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


HOLDING = """
import sys, torch, dither
from pathlib import Path
from torch import nn
if sys.argv[1] == "keep":
    dither.keep_memory()
torch.manual_seed(0)
layers = [part for _ in range(6) for part in (nn.Linear(384, 384, bias=False), nn.ReLU())]
model, x = nn.Sequential(*layers), torch.randn(24, 256, 384)
def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
def step():
    return dither.clipped_sum(model, lambda: model(x).square().mean((1, 2)), strategy="hold")
small = x[:1].clone()
dither.clipped_sum(model, lambda: model(small).square().mean((1, 2)), strategy="hold")
started = peak()
for _ in range(3):
    result = step()
print(peak() - started, float(result.gradients["0.weight"].double().norm()))
"""


def test_held_gradients_take_what_activations_left():
    """On average: one process's peak differs by a tenth from another's, the way its pages happen to fall."""
    peaks: dict[str, list[int]] = {"keep": [], "leave": []}
    norms = set()
    for word in ("keep", "leave") * 3:
        done = subprocess.run([sys.executable, "-c", HOLDING, word], capture_output=True, text=True, check=True)
        peak, norm = done.stdout.split()
        peaks[word].append(int(peak))
        norms.add(float(norm))
    assert sum(peaks["keep"]) < 0.85 * sum(peaks["leave"])
    assert min(norms) == pytest.approx(max(norms), rel=1e-6)
