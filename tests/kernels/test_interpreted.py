"""The kernels' numbers in Triton's interpreter, chosen before Triton is imported: in a process of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kernels.platforms import needs_triton

ROOT = Path(__file__).parents[2]
RUNS = {
    "kernels": ["tests/kernels/interpreted", "-o", "python_files=[lcr]*.py"],
    # The same tests that the ordinary rules pass, where the kernels are taken.
    "conformance": ["tests/rules", "-k", "float32 and (groups or (linear and first))"],
    "extremes": ["tests/clipping/test_precision.py", "-k", "tile"],
}


@needs_triton
@pytest.mark.parametrize("run", RUNS)
def test_in_the_interpreter(run):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *RUNS[run]]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert re.search(r"\d+ passed", done.stdout) and "skipped" not in done.stdout
