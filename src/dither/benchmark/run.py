"""A whole run: every model, every contender, sweeps and plans."""

from __future__ import annotations

import datetime
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from dither.benchmark import worker
from dither.benchmark.models import workload
from dither.benchmark.results import Results, Row

_MEASURED = ("torch", "dither", "opacus", "opake", "diffusers", "transformers")


@dataclass(frozen=True)
class Request:
    """What to measure, and how.

    Attributes:
        models: of models.MODELS.
        contenders: of contenders.CONTENDERS; plain is always among them.
        microbatches: in a step.
        pairs: rounds that count.
        warm_up: steps before them.
        memory: whether peaks are measured.
        sweeps: of sweep.AXES.
        explain: whether plans are compared with what uses take.
        smoke: tiny sizes.
        compile: whether the blocks of the plain step and of dither's are compiled.
        threads: of torch and XLA; None for their own choice.
        jax_python: the Python of an environment with jax-privacy; None leaves it out.
    """

    models: Sequence[str]
    contenders: Sequence[str]
    microbatches: int = 8
    pairs: int = 7
    warm_up: int = 2
    memory: bool = True
    sweeps: Sequence[str] = ()
    explain: bool = False
    smoke: bool = False
    compile: bool = False
    threads: int | None = None
    jax_python: str | None = None

    def sent(self) -> dict[str, Any]:
        """What every worker is told."""
        names = ("microbatches", "pairs", "warm_up", "smoke", "threads", "compile")
        return {name: getattr(self, name) for name in names}


def run(request: Request, say: Callable[[str], None], keep: Callable[[Results], None]) -> Results:
    """Measure everything.

    Args:
        request: what.
        say: told what is being measured.
        keep: given the results so far after each part; a whole run takes hours.
    """
    results = Results(about(request))
    for model in request.models:
        results.rows.append(_row(model, request, say))
        if request.jax_python is not None and model.startswith("dit"):
            say(f"{model}: jax-privacy")
            _add_jax(results, results.rows[-1], request)
        keep(results)
    for axis in request.sweeps:
        say(f"growth with {axis}")
        with _failures(results, f"growth with {axis}"):
            results.growth.append(worker.growth(axis, request.sent()))
        keep(results)
    for model in request.models if request.explain else ():
        say(f"{model}: the plan")
        with _failures(results, f"the plan of {model}"):
            results.explained[model] = worker.explained({**request.sent(), "model": model})
        keep(results)
    return results


@contextmanager
def _failures(results: Results, what: str) -> Iterator[None]:
    try:
        yield
    except worker.WorkerError as error:
        results.failed.append(f"{what}: {error}")


def _row(model: str, request: Request, say: Callable[[str], None]) -> Row:
    names = ["plain", *(name for name in request.contenders if name != "plain")]
    sent = {**request.sent(), "model": model}
    say(f"{model}: times of {len(names)} contenders")
    cells = worker.times(names, sent)
    for name in names if request.memory else ():
        if cells[name].error is not None:
            continue
        say(f"{model}: memory of {name}")
        found = worker.peak(name, sent)
        fields = ("error", "peak_mib", "first_peak_mib", "process_mib")
        cells[name] = replace(cells[name], **{field: getattr(found, field) for field in fields})
    return Row(model, str(workload(model, request.smoke).sizes), cells)


def _add_jax(results: Results, row: Row, request: Request) -> None:
    assert request.jax_python is not None
    sizes = workload(row.model, request.smoke).sizes
    shape = {name: getattr(sizes, name) for name in ("width", "depth", "tokens", "batch")}
    found, versions = worker.jax(request.jax_python, {**request.sent(), **shape}, request.memory)
    row.cells.update(found)
    results.about["versions"].update(versions)


def about(request: Request) -> dict[str, Any]:
    """Machine, versions, date and settings."""
    import torch

    return {
        "machine": machine(),
        "versions": {"python": platform.python_version(), **_versions()},
        "date": datetime.date.today().isoformat(),
        "threads": torch.get_num_threads() if request.threads is None else request.threads,
        "smoke": request.smoke,
        "compile": request.compile,
        "settings": {name: getattr(request, name) for name in ("microbatches", "pairs", "warm_up")},
    }


def machine() -> str:
    """The CPU, its cores, and the memory."""
    name = platform.processor() or platform.machine()
    cpus, memory = Path("/proc/cpuinfo"), ""
    if cpus.exists():
        found = [line.split(":")[1].strip() for line in cpus.read_text().splitlines() if line.startswith("model name")]
        name = found[0] if found else name
        memory = f", {os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.0f} GiB"
    return f"{name}, {os.cpu_count()} cores{memory}"


def _versions() -> dict[str, str]:
    found = {}
    for name in _MEASURED:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            if name == "dither":  # run from its source
                from dither import __version__

                found[name] = __version__
    return found
