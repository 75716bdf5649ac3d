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


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Show what tests recorded under the name "shown": their own output is kept back."""
    reports = [*terminalreporter.getreports("passed"), *terminalreporter.getreports("failed")]
    lines = [line for report in reports for name, line in report.user_properties if name == "shown"]
    if lines:
        terminalreporter.section("compiled kernels")
        terminalreporter.write_line("\n".join(lines))


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
