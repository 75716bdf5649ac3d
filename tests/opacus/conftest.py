"""Helpers of this folder, importable by name, and code under `dither.opacus.install()`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import dither.opacus

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def installed():
    """What the test imported from `opacus` is dither's until it ends."""
    with dither.opacus.install():
        yield
