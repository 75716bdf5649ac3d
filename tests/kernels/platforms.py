"""Where Triton has wheels, its tests run or fail; elsewhere they are skipped."""

from __future__ import annotations

import platform
import sys

import pytest

HAS_WHEELS = sys.platform == "linux" and platform.machine() in ("x86_64", "aarch64")
needs_triton = pytest.mark.skipif(not HAS_WHEELS, reason=f"Triton has no wheel for {sys.platform} {platform.machine()}")
