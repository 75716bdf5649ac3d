"""The kernels compiled for GPUs that are not here: binaries come out, nothing spills, shared memory suffices."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kernels.platforms import needs_triton

ROOT = Path(__file__).parents[2]
KERNELS = {"linear": 3, "convolution": 2, "weighted sum": 1, "squares": 1, "add and square": 1}
"""How many shape classes each kernel has."""


def compiled(dtype: str) -> list[dict]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "benchmarks/kernels_aot.py", "--json", "--dtype", dtype]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_every_kernel_compiles_without_spills(dtype, record_property):
    found = compiled(dtype)
    for line in found:
        name = f"{line['kernel']} {dtype} sm_{line['sm']} {line['sizes']}"
        record_property("shown", f"{name:50} {line['registers']:3} registers {line['shared']:6} bytes shared")
        assert line["cubin"] > 0
        assert line["spills"] == 0, line
        assert line["registers"] <= 255 and line["shared"] <= line["allowed"], line
    for name, classes in KERNELS.items():
        for sm in (80, 90):
            of_kernel = {line["class"] for line in found if line["class"].startswith(name) and line["sm"] == sm}
            assert len(of_kernel) == (classes if name != "add and square" or dtype == "fp32" else 0), (name, sm)
