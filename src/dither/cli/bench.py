"""`dither bench`: what privacy costs, in time and memory, beside the plain step and beside other libraries."""

from __future__ import annotations

import functools
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse import ActionConfigFile, ArgumentParser, Namespace

from dither.cli.parsing import Formatter, parse
from dither.errors import ConfigurationError, OutputPathError

if TYPE_CHECKING:
    from dither.benchmark.results import Results

EXAMPLES = """
examples:
  dither bench --smoke                                    everything at tiny sizes, to see that it runs
  dither bench --models dit-384 --contenders auto opacus_ghost --memory false
  dither bench --sweep batch tokens --models              only how step time grows with a size
  dither bench --models dit-768 --explain                 what the plan expects of each use, and what it takes
  dither bench --save now.json --check benchmarks/baseline.json
  dither bench --load now.json --page performance.md --picture performance.png

models: dit-384 dit-768 dit-256 dit-1024 unet gpt2
contenders: plain auto hold ghost tile two_pass opacus_hooks opacus_functorch opacus_ghost opake; and jax-privacy, with
--jax_python. Steps are paired and interleaved in one process; peaks of memory have a process each. A contender that
cannot run a model has its error in the table. Quote the ratios: lone times say more of the machine than of the code.

Exit code 1: --check found a ratio of dither's that grew by more than a tenth.
"""

REGRESSED = 1


def bench_parser() -> ArgumentParser:
    """The parser of `dither bench`."""
    parser = ArgumentParser(
        prog="dither bench",
        usage="dither bench [options]",
        description="Measure step time and peak memory of private training over plain training.",
        epilog=EXAMPLES,
        formatter_class=Formatter,
        exit_on_error=False,
    )
    add = parser.add_argument
    add("--config", action=ActionConfigFile, help="a YAML file of these options; words after it win")
    add("--models", type=str, nargs="*", default=["all"], help="what is trained; --models alone is none")
    add("--contenders", type=str, nargs="+", default=["all"], help="who trains it, the plain step always")
    add("--smoke", action="store_true", help="tiny sizes")
    add("--compile", action="store_true", help="compile the DiTs' blocks, in the plain step and in dither's")
    add("--microbatches", type=int, default=8, help="micro-batches in a step")
    add("--pairs", type=int, default=7, help="rounds that are measured")
    add("--warm_up", type=int, default=2, help="steps before them; dither proves in micro-batches 1, 2, 4, 8, 16")
    add("--threads", type=int | None, default=None, help="of each process; None for the libraries' own choice")
    add("--memory", type=bool, default=True, help="measure peaks of memory too (Linux)")
    add("--sweep", type=str, nargs="*", default=[], help="sizes to grow: batch tokens width views depth, or all")
    add("--explain", action="store_true", help="compare each model's plan with what its uses take")
    add("--jax_python", type=str | None, default=None, help="Python of an environment with jax-privacy")
    add("--load", type=Path | None, default=None, help="show these results of --save instead of measuring")
    add("--save", type=Path | None, default=None, help="write the results, JSON")
    add("--page", type=Path | None, default=None, help="write them as a Markdown page")
    add("--picture", type=Path | None, default=None, help="draw them (.png, .svg, .pdf)")
    add("--check", type=Path | None, default=None, help="compare with these results of --save")
    return parser


def run(words: Sequence[str]) -> int:
    """Run `dither bench`; returns the exit code."""
    options = parse(bench_parser(), words)
    from dither.benchmark import check, picture, table
    from dither.benchmark.results import Results

    _refuse(options)
    baseline = None if options.check is None else Results.load(options.check)
    results = _measure(options) if options.load is None else Results.load(options.load)
    _keep(results, options.save)
    print(table.origin(results))
    for title, _, found in table.sections(results):
        print(f"\n{title}\n\n{found}")
    for said in results.failed:
        print(f"not measured: {said}", file=sys.stderr)
    if options.picture is not None:
        _write(lambda: picture.draw(results, options.picture), options.picture)
    if options.page is not None:
        text = table.page(results, "dither bench --page", _relative(options.picture, options.page))
        _write(lambda: options.page.write_text(text), options.page)
    if baseline is None:
        return 0
    grown = check.regressions(results, baseline)
    for said in grown:
        print(f"regressed: {said}", file=sys.stderr)
    return REGRESSED if grown else 0


def _measure(options: Namespace) -> Results:
    from dither.benchmark import run as whole
    from dither.benchmark.contenders import CONTENDERS
    from dither.benchmark.models import MODELS
    from dither.benchmark.results import Results
    from dither.benchmark.sweep import AXES

    request = whole.Request(
        models=_chosen("models", options.models, MODELS),
        contenders=_chosen("contenders", options.contenders, CONTENDERS),
        sweeps=_chosen("sweep", options.sweep, AXES),
        **{
            name: options[name]
            for name in (
                "microbatches",
                "pairs",
                "warm_up",
                "memory",
                "explain",
                "smoke",
                "compile",
                "threads",
                "jax_python",
            )
        },
    )
    keep = functools.partial(_keep, path=options.save)
    keep(Results(whole.about(request)))  # a path that cannot be written is found now, not after hours
    return whole.run(request, lambda said: print(said, file=sys.stderr, flush=True), keep)


def _keep(results: Results, path: Path | None) -> None:
    if path is not None:
        _write(lambda: results.save(path), path)


def _chosen(option: str, given: Sequence[str], known: Iterable[str]) -> list[str]:
    names = list(known)
    if list(given) == ["all"]:
        return names
    for name in given:
        if name not in names:
            raise ConfigurationError(f"--{option} {name} is not known", fix=f"choose of: {' '.join(names)}; or all")
    return list(dict.fromkeys(given))


def _refuse(options: Namespace) -> None:
    """What cannot work is said before anything is measured."""
    for name in ("microbatches", "pairs", "warm_up", "threads"):
        if options[name] is not None and options[name] < 1:
            raise ConfigurationError(f"--{name} {options[name]} is not above 0", fix="give a positive number")
    if options.memory and not Path("/proc/self/clear_refs").exists():
        raise ConfigurationError("peaks of memory are measured on Linux only", fix="--memory false")
    if options.jax_python is not None and shutil.which(options.jax_python) is None:
        raise ConfigurationError(f"--jax_python {options.jax_python} is no program", fix="give the path of a Python")
    for path in (options.save, options.page, options.picture):
        if path is not None and path.is_dir():
            raise OutputPathError(f"{path} is a folder", fix="give a file")
    if options.picture is not None and options.picture.suffix not in (".png", ".svg", ".pdf"):
        raise ConfigurationError(f"--picture {options.picture} is no picture", fix="end it in .png, .svg or .pdf")


def _write(write: Callable[[], object], path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write()
    except OSError as error:
        raise OutputPathError(f"cannot write {path}: {error.strerror}", fix="give a file that can be written") from None


def _relative(picture: Path | None, page: Path) -> str | None:
    return None if picture is None else os.path.relpath(picture, page.parent).replace(os.sep, "/")
