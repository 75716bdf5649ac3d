"""Step times of contenders in turns, in this process; peak memory of one, in a process of its own."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from dither.allocator import give_back
from dither.benchmark.contenders import OURS, Contender, contender
from dither.benchmark.models import MODELS, Workload
from dither.benchmark.results import Cell

Made = TypeVar("Made")

PEAK_MICROBATCHES = 2
"""In the steps whose peak is taken: one that begins the sum and one that adds to it. More take time, not memory."""

MEASURED_STEP = 3
"""Whose peak of memory is taken: gradients and optimizer state are there since the first, and dither, which proves
its gradients in micro-batches 1, 2, 4 and 8, proves none in it."""


def first_line(error: BaseException) -> str:
    """What a cell says of a contender that cannot run: the error's type and first line."""
    said = getattr(error, "what", str(error)).strip().split("\n")[0]
    return f"{type(error).__name__}: {said}"


def times(workload: Workload, names: Sequence[str], *, microbatches: int, pairs: int, warm_up: int) -> dict[str, Cell]:
    """Time contenders in turns; each round begins with the next one.

    Args:
        workload: model and data.
        names: of contenders.
        microbatches: in a step.
        pairs: rounds that count.
        warm_up: steps of each before them, at least one.

    Returns:
        By name: times, the first step, and how far its clipped sum is from dither's.
    """
    cells = {name: Cell() for name in names}
    _compare(workload, min(microbatches, 2), cells)
    running: dict[str, Contender] = {}
    for name in names:
        made = _try(cells[name], lambda name=name: contender(name, workload, microbatches))  # type: ignore[misc]
        if made is not None:
            running[name] = made
            cells[name].first_seconds = _timed(cells[name], made)
            for _ in range(warm_up - 1):
                _timed(cells[name], made)
    for number in range(pairs):
        order = list(running)
        for name in order[number % len(order) :] + order[: number % len(order)] if order else []:
            if cells[name].error is None:
                taken = _timed(cells[name], running[name])
                if taken is not None:
                    cells[name].seconds.append(taken)
    for cell in cells.values():
        if cell.error is not None:
            cell.seconds, cell.first_seconds = [], None
    return cells


def _compare(workload: Workload, microbatches: int, cells: Mapping[str, Cell]) -> None:
    """Fill in the distances of the clipped sums, from the same weights."""
    private = [name for name in cells if name != "plain"]
    reference: dict[str, Tensor] | None = None
    for name in sorted(private, key=lambda name: name not in OURS):  # stable: one of dither's is the reference
        found = _try(cells[name], lambda name=name: contender(name, workload, microbatches).sums())  # type: ignore[misc]
        if found is None:
            continue
        reference = found if reference is None else reference
        cells[name].distance = distance(found, reference)


def distance(found: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> float:
    """Relative distance of two sums; a parameter that is missing counts as zero."""
    wrong = total = 0.0
    for name, expected in reference.items():
        got = found.get(name)
        wrong += float((expected if got is None else got - expected).double().square().sum())
        total += float(expected.double().square().sum())
    return float((wrong / total) ** 0.5) if total else float(wrong > 0)


def _try(cell: Cell, make: Callable[[], Made]) -> Made | None:
    """The result, or None and the error's first line in the cell."""
    if cell.error is not None:
        return None
    try:
        return make()
    except Exception as error:  # whatever a library raises is what the table says of it
        cell.error = first_line(error)
        return None


def _timed(cell: Cell, chosen: Contender) -> float | None:
    def step() -> float:
        start = time.perf_counter()
        chosen.step()
        return time.perf_counter() - start

    return _try(cell, step)


def peak(workload: Workload, name: str) -> Cell:
    """Peak of resident memory in the first step and in a later one. Call it in a fresh process.

    What is subtracted was resident when only code, model and data were there: gradients, sums and the optimizer's
    state count.
    """
    cell = Cell()
    small = replace(MODELS[workload.name].workload(workload.name, smoke=True), compiled=workload.compiled)
    _try(cell, lambda: contender(name, small, 1).step())  # loads the code that a step runs
    kept = workload.build(), workload.batches(PEAK_MICROBATCHES)  # as much as the contender's own copies
    gc.collect()
    give_back()
    before = resident()
    del kept
    gc.collect()
    chosen = _try(cell, lambda: contender(name, workload, PEAK_MICROBATCHES))
    if chosen is None:
        return cell
    for number in range(1, MEASURED_STEP + 1):
        give_back()
        forget_peak()
        _try(cell, chosen.step)
        if cell.error is not None:
            break
        highest = high_water()
        taken = (highest - before) / 2**20
        if number == 1:
            cell.first_peak_mib = taken
        cell.peak_mib, cell.process_mib = taken, highest / 2**20
    if cell.error is not None:
        cell.peak_mib = cell.first_peak_mib = cell.process_mib = None
    return cell


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name + ":")) * 2**10


def resident() -> int:
    """Bytes resident now (Linux)."""
    return _status("VmRSS")


def high_water() -> int:
    """The most bytes that were resident since `forget_peak`; what ru_maxrss says, which cannot be reset (Linux)."""
    return _status("VmHWM")


def forget_peak() -> None:
    """Start the high water anew."""
    Path("/proc/self/clear_refs").write_text("5")
