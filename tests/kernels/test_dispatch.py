"""A CPU keeps the ordinary way, and never imports Triton."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from dither import kernels
from dither.kernels import tiles

SCRIPT = """
import sys
import torch
from torch import nn
import dither

model, x = nn.Sequential(nn.Conv1d(3, 4, 2), nn.Linear(4, 5)), torch.randn(6, 3, 5)
for strategy in ("hold", "tile"):
    dither.clipped_sum(model, lambda: model(x).square().flatten(1).sum(1), strategy=strategy)
assert "dither.kernels" in sys.modules
assert not [name for name in sys.modules if name.split(".")[0] == "triton"]
"""


def test_a_cpu_never_imports_triton():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", SCRIPT], env=environment, check=True)


def test_a_cpu_is_declined():
    assert not kernels.serve(torch.ones(3))


@pytest.mark.parametrize("sm", [tiles.SM80, tiles.SM90])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_shape_has_an_entry(sm, dtype):
    shapes = [(1, 1), (40, 16), (64, 33), (130, 128), (128, 128), (512, 256)]
    classes = {tiles.linear_class(torch.ones(1, 4, d), torch.ones(1, 4, p)) for p, d in shapes}
    classes |= {tiles.convolution_class(*shape) for shape in shapes}
    assert len(classes) == 5
    for name in (*classes, "weighted sum", "squares"):
        entry = tiles.TABLE[sm, dtype, name]
        assert all(size & (size - 1) == 0 for size in (entry.rows, entry.p, entry.d, entry.warps))


def test_large_tiles_are_for_rows_that_copy_16_bytes_at_a_time():
    g = torch.ones(2, 8, 256)
    assert tiles.linear_class(torch.ones(2, 8, 128), g) == "linear large"
    assert tiles.linear_class(torch.ones(2, 8, 136), g) == "linear medium"
    assert tiles.linear_class(torch.ones(2, 128, 8).mT, g) == "linear medium"
    assert tiles.linear_class(torch.ones(2 * 8 * 128 + 1)[1:].view(2, 8, 128), g) == "linear medium"
