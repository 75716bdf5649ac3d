"""Shared set-up: one thread a process, and helpers importable by name."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import forks
from seeding import seed_only_what_is_there

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent / "rules")]
torch.set_num_threads(1)
seed_only_what_is_there()


@pytest.fixture(scope="session")
def programs() -> Iterator[forks.Server]:
    """Forks programs from a process that has imported what takes long, but nothing of dither's or Opacus's."""
    server = forks.Server("torch._dynamo", "torch.distributed.tensor", "scipy.stats", "sklearn.datasets")
    yield server
    server.close()


@pytest.fixture
def double_precision():
    """Float64 by default, and a fixed seed."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
