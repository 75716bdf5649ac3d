"""What this machine has: free memory, and how fast it multiplies matrices and moves memory.

Speeds are measured once, in under a second, and kept.

The figures only choose between ways to the same sums. They are kept by machine, torch version and number of threads in
`$XDG_CACHE_HOME/dither/rates.json` (`~/.cache` without that variable); delete the file to measure again.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from dither.clipping.cgroups import left_by_cgroups
from dither.files import replacing


@dataclass(frozen=True)
class Rates:
    """Speeds of one device.

    Attributes:
        gemm: floating-point operations a second of one large matrix product.
        batched: the same of a batch of large products, one an example.
        small: the same of a batch of products with few rows, as Gram matrices are.
        memory: bytes a second that a pass over held gradients reads.
    """

    gemm: float
    batched: float
    small: float
    memory: float


BUILTIN = Rates(gemm=150e9, batched=150e9, small=90e9, memory=20e9)
"""Of a CPU with two cores; only their ratios matter."""

WORTH_MEASURING = 2e9
"""Floating-point operations of a step's weight gradients below which `BUILTIN` is good enough."""

_fixed: ContextVar[bool] = ContextVar("fixed", default=False)
_known: dict[str, Rates] = {}


@contextmanager
def builtin_rates() -> Iterator[None]:
    """Plan without measuring inside: what must repeat bit for bit must not depend on a measurement."""
    token = _fixed.set(True)
    try:
        yield
    finally:
        _fixed.reset(token)


def rates_of(device: torch.device, work: float = float("inf")) -> Rates:
    """The device's speeds: kept, or measured now.

    Args:
        device: where the gradients are.
        work: floating-point operations that are planned; little work is not worth a measurement.
    """
    if _fixed.get() or work < WORTH_MEASURING or torch.are_deterministic_algorithms_enabled():
        return BUILTIN
    key = _key(device)
    if key not in _known:
        kept = _read().get(key)
        if kept is None:
            kept = measure(device)
            _write({**_read(), key: kept})
        _known[key] = kept
    return _known[key]


def measure(device: torch.device) -> Rates:
    """Measure a device's speeds, in under a second."""
    with torch.no_grad():
        rows, wide = torch.randn(8, 256, 384, device=device), torch.randn(8, 256, 1536, device=device)
        few = torch.randn(64, 48, 512, device=device)
        held = torch.randn(8, 1 << 21, device=device)
        product, total, weights = rows.new_empty(8, 1536, 384), held.new_zeros(1 << 21), held.new_ones(8)

        def passes() -> None:
            torch.linalg.vector_norm(held, dim=1)
            total.addmv_(held.T, weights)

        flops = 2.0 * rows.numel() * 1536
        return Rates(
            gemm=flops / _fastest(lambda: wide.view(-1, 1536).T @ rows.view(-1, 384), device),
            batched=flops / _fastest(lambda: torch.bmm(wide.mT, rows, out=product), device),
            small=2.0 * few.numel() * 48 / _fastest(lambda: torch.bmm(few, few.mT), device),
            memory=2.0 * held.numel() * held.element_size() / _fastest(passes, device),
        )


def free_memory(device: torch.device) -> float:
    """Bytes free on a device; of the machine or the container for a CPU, with what it would give up at once."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    return min(_free_on_the_machine(), left_by_cgroups())


def _free_on_the_machine() -> float:
    with suppress(OSError), open("/proc/meminfo") as lines:
        for line in lines:
            if line.startswith("MemAvailable:"):
                return 1024.0 * float(line.split()[1])
    try:
        return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (ValueError, OSError, AttributeError):
        return float(2**31)


def _fastest(work: Callable[[], object], device: torch.device, repeats: int = 5) -> float:
    """Seconds of the fastest of a few runs: a busy machine disturbs the others."""
    times = []
    for _ in range(repeats + 1):
        _wait(device)
        start = time.perf_counter()
        work()
        _wait(device)
        times.append(time.perf_counter() - start)
    return max(min(times[1:]), 1e-9)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _key(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{_processor()} {torch.get_num_threads()}"
    return f"torch {torch.__version__} {device.type} {name}"


def _processor() -> str:
    with suppress(OSError), open("/proc/cpuinfo") as lines:
        return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    return platform.processor() or platform.machine()


def _file() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dither" / "rates.json"


def _read() -> dict[str, Rates]:
    """What is kept; nothing if the file is missing or no longer makes sense."""
    with suppress(OSError, ValueError, TypeError, RuntimeError, AttributeError):
        return {key: Rates(**kept) for key, kept in json.loads(_file().read_text()).items()}
    return {}


def _write(rates: dict[str, Rates]) -> None:
    """Keep them; a machine where that is not possible measures in each process."""
    with suppress(OSError, RuntimeError):
        file = _file()
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as partial:
            partial.write_text(json.dumps({key: asdict(kept) for key, kept in rates.items()}, indent=1))
