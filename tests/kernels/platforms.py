"""Where Triton has wheels, its tests run or fail; elsewhere they are skipped."""

from __future__ import annotations

import platform
import sys
from importlib.metadata import PackageNotFoundError, version

import pytest

TESTED = (3, 8)
"""Older interpreters fail under numpy 2.4, and older compilers spill where this one does not."""


def reason_to_skip() -> str:
    """Why the tests cannot run here; empty if they can, or if Triton is missing where it has a wheel."""
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"):
        return f"Triton has no wheel for {sys.platform} {platform.machine()}"
    try:
        found = version("triton")
    except PackageNotFoundError:
        return ""
    older = tuple(int(part) for part in found.split(".")[:2]) < TESTED
    return f"the installed torch brings Triton {found}; the tests are for 3.8 and newer" if older else ""


needs_triton = pytest.mark.skipif(bool(reason_to_skip()), reason=reason_to_skip() or "Triton is there")
