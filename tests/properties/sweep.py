"""Thousands of generated models, every strategy, against the float64 oracle: `python tests/properties/sweep.py --help`.

One line a function of dither: models, how many were exact and the largest errors, which were refused by which error,
neighbouring pairs, failures. Any failure ends it with status 1 and the command that shows the model.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import torch

sys.path[:0] = [str(Path(__file__).parents[1])]

from properties.checking import FUNCTIONS, Outcome, check  # noqa: E402
from properties.models import random_program  # noqa: E402
from properties.program import Program  # noqa: E402

_SPACING = 10**7
_SHOWN = 20
_COUNTS = {"Refused by kind": "refused", "Wrong on purpose, refused by kind": "wrong_refused", "Failed": "failed"}


def program_of(seed: int) -> Program:
    """The model of a seed; one in five is wrong on purpose."""
    random = Random(seed)
    return random_program(random, wrong=random.randrange(5) == 0)


def _run(task: tuple[int, tuple[str, ...], bool]) -> tuple[int, bool, list[Outcome]]:
    seed, functions, neighbours = task
    program = program_of(seed)
    return seed, bool(program.wrong), check(program, functions, neighbours)


def _start() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")


@dataclass
class Row:
    """What one function did."""

    models: int = 0
    exact: int = 0
    equal: int = 0
    ill_conditioned: int = 0
    neighbours: int = 0
    error_64: float = 0.0
    error_32: float = 0.0
    refused: Counter[str] = field(default_factory=Counter)
    wrong_refused: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)

    def add(self, outcome: Outcome, wrong: bool) -> None:
        self.models += 1
        self.exact += outcome.kind == "exact"
        self.equal += outcome.kind == "equal"
        self.neighbours += outcome.neighbours
        self.ill_conditioned += not outcome.conditioned
        if outcome.conditioned:
            self.error_64 = max(self.error_64, outcome.error_64)
            self.error_32 = max(self.error_32, outcome.error_32)
        if outcome.kind == "refused":
            (self.wrong_refused if wrong else self.refused)[outcome.why] += 1
        if outcome.kind == "failed":
            self.failed[outcome.why] += 1


def table(rows: dict[str, Row]) -> str:
    """The table, then the refusals by kind."""
    head = "function    models   exact  float64  float32  ill-cond.  neighbours  refused  wrong: refused  equal  FAILED"
    lines = [head]
    for name, row in rows.items():
        lines.append(
            f"{name:9} {row.models:8} {row.exact:7}  {row.error_64:.1e}  {row.error_32:.1e} {row.ill_conditioned:10} "
            f"{row.neighbours:11} {row.refused.total():8} {row.wrong_refused.total():15} {row.equal:6} "
            f"{row.failed.total():7}"
        )
    for title, which in _COUNTS.items():
        lines.append(f"{title}:")
        for name, row in rows.items():
            counts: Counter[str] = getattr(row, which)
            lines.append(f"  {name:9} " + ", ".join(f"{kind} {n}" for kind, n in counts.most_common()))
    return "\n".join(lines)


def outcomes(arguments: argparse.Namespace) -> Iterator[tuple[int, bool, list[Outcome]]]:
    """Every case's outcomes, as they come."""
    functions = tuple(arguments.strategy or FUNCTIONS)
    first = arguments.seed * _SPACING
    seeds = [arguments.only_seed] if arguments.only_seed is not None else range(first, first + arguments.cases)
    tasks = [(seed, functions, not arguments.no_neighbours) for seed in seeds]
    if arguments.workers < 2:
        _start()
        yield from map(_run, tasks)
        return
    with multiprocessing.get_context("spawn").Pool(arguments.workers, _start) as pool:
        yield from pool.imap_unordered(_run, tasks, chunksize=20)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=1000, help="number of models")
    parser.add_argument("--strategy", action="append", choices=FUNCTIONS, help="default: gradients, norms and all five")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--no-neighbours", action="store_true", help="exactness alone, on one batch; faster")
    parser.add_argument("--only-seed", type=int, help="print and check the model of this seed alone")
    arguments = parser.parse_args()
    if arguments.only_seed is not None:
        program = program_of(arguments.only_seed)
        print(f"B = {program.batch}; wrong on purpose: {program.wrong or 'no'}\n{program.source}\n")
    rows = {name: Row() for name in arguments.strategy or FUNCTIONS}
    started, failures = time.perf_counter(), 0
    for seed, wrong, found in outcomes(arguments):
        for outcome in found:
            rows[outcome.function].add(outcome, wrong)
        failed = [outcome for outcome in found if outcome.kind == "failed"]
        failures += len(failed)
        if failed and failures - len(failed) < _SHOWN:
            print(f"FAILED {failed[0].function}: {failed[0].why}: {failed[0].detail}")
            print(f"  python tests/properties/sweep.py --only-seed {seed} --strategy {failed[0].function}", flush=True)
    took = time.perf_counter() - started
    checks = sum(row.models for row in rows.values())
    print(table(rows))
    print(f"{checks} checks in {took:.0f} s, {checks / took / max(1, arguments.workers):.0f} a second and worker")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
