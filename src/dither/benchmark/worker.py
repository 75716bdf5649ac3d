"""Measurements in processes of their own: a crash costs a cell, and peaks of memory belong to one contender.

`python -m dither.benchmark.worker '{"task": ...}'` measures in this process and prints JSON; `ask` starts it.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from dither.allocator import keep_memory
from dither.benchmark import measure, models
from dither.benchmark.measure import PEAK_MICROBATCHES, first_line
from dither.benchmark.results import JAX_PLAIN, JAX_PRIVATE, Cell, Explained, Growth

JAX_SCRIPT = Path(__file__).with_name("jax_step.py")


class WorkerError(Exception):
    """A worker died; the message fits a cell."""


def ask(request: dict[str, Any], command: Sequence[str] = ()) -> Any:
    """Send a request to a new process and return what it prints.

    Args:
        request: with its task.
        command: the worker; this module's if not given.

    Raises:
        WorkerError: it failed; with the last line of its errors, or the signal that ended it.
    """
    command = command or (sys.executable, "-m", "dither.benchmark.worker")
    done = subprocess.run([*command, json.dumps(request)], capture_output=True, text=True, check=False)
    if done.returncode < 0:
        raise WorkerError(f"ended by {signal.Signals(-done.returncode).name}")
    if done.returncode:
        raise WorkerError((done.stderr.strip().splitlines() or ["no message"])[-1])
    return json.loads(done.stdout.strip().splitlines()[-1])


def times(names: Sequence[str], request: dict[str, Any]) -> dict[str, Cell]:
    """Times of all contenders, in one process."""
    try:
        found = ask({**request, "task": "times", "contenders": list(names)})
    except WorkerError as error:
        return {name: Cell(error=str(error)) for name in names}
    return {name: Cell(**cell) for name, cell in found.items()}


def peak(name: str, request: dict[str, Any]) -> Cell:
    """Peak memory of one contender."""
    try:
        return Cell(**ask({**request, "task": "peak", "contender": name}))
    except WorkerError as error:
        return Cell(error=str(error))


def jax(python: str, request: dict[str, Any], memory: bool) -> tuple[dict[str, Cell], dict[str, str]]:
    """jax-privacy and plain JAX by another environment's Python: cells, and versions."""
    names, command = (JAX_PLAIN, JAX_PRIVATE), (python, str(JAX_SCRIPT))
    try:
        found = ask({**request, "task": "times"}, command)
        cells = {name: Cell(**found["cells"][name]) for name in names}
        for name in names if memory else ():
            small = {**request, "task": "peak", "contender": name, "microbatches": PEAK_MICROBATCHES}
            part = ask(small, command)["cells"][name]
            cells[name] = replace(cells[name], **part)
    except (WorkerError, OSError) as error:
        return {name: Cell(error=str(error)) for name in names}, {}
    return cells, found["versions"]


def growth(axis: str, request: dict[str, Any]) -> Growth:
    """A sweep along one size, in one process."""
    return Growth(**ask({**request, "task": "sweep", "axis": axis}))


def explained(request: dict[str, Any]) -> list[Explained]:
    """The uses of one model, predicted and measured."""
    return [Explained(**use) for use in ask({**request, "task": "explain"})]


def _workload(asked: dict[str, Any]) -> models.Workload:
    return replace(models.workload(asked["model"], asked["smoke"]), compiled=asked.get("compile", False))


def _times(asked: dict[str, Any]) -> Any:
    options = {name: asked[name] for name in ("microbatches", "pairs", "warm_up")}
    found = measure.times(_workload(asked), asked["contenders"], **options)
    return {name: asdict(cell) for name, cell in found.items()}


def _peak(asked: dict[str, Any]) -> Any:
    return asdict(measure.peak(_workload(asked), asked["contender"]))


def _sweep(asked: dict[str, Any]) -> Any:
    from dither.benchmark.sweep import sweep

    options = {name: asked[name] for name in ("microbatches", "pairs", "warm_up", "smoke")}
    return asdict(sweep(asked["axis"], **options))


def _explain(asked: dict[str, Any]) -> Any:
    from dither.benchmark.explain import explain

    return [asdict(use) for use in explain(models.workload(asked["model"], asked["smoke"]))]


TASKS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "times": _times,
    "peak": _peak,
    "sweep": _sweep,
    "explain": _explain,
}


def main() -> None:
    """Do what the first argument asks."""
    import torch

    asked = json.loads(sys.argv[1])
    keep_memory()  # whoever is measured, as dither's commands do
    if asked["threads"] is not None:
        torch.set_num_threads(asked["threads"])
    warnings.simplefilter("ignore")  # of other libraries; what matters is an error, and in the table
    try:
        found = TASKS[asked["task"]](asked)
    except Exception as error:
        traceback.print_exc()
        print(first_line(error), file=sys.stderr)  # the last line is what the cell says
        raise SystemExit(1) from None
    print(json.dumps(found))


if __name__ == "__main__":
    main()
