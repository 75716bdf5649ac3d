"""`dither budget`: of epsilon, noise and steps, the one that the other two leave open."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from jsonargparse import ActionConfigFile, ArgumentParser, Namespace
from rich.console import Console
from rich.table import Table

from dither.cli.delta import warning_of
from dither.cli.parsing import Formatter, parse
from dither.errors import BatchSizeError, ConfigurationError

EXAMPLES = """
examples, each leaving one of --epsilon, --noise_multiplier, --steps to be computed:
  noise    dither budget --dataset_size 60000 --batch_size 1024 --steps 5000 --epsilon 8 --delta 1e-5
  epsilon  dither budget --dataset_size 60000 --batch_size 1024 --steps 5000 --noise_multiplier 1.1 --delta 1e-5
  steps    dither budget --dataset_size 60000 --batch_size 1024 --noise_multiplier 1.1 --epsilon 8 --delta 1e-5

The mechanism is the one `dither train` runs: Poisson batches, Gaussian noise, neighbours that differ by adding
or removing one example. A warm-up that `dither train` pays from the same epsilon is not counted. Nothing here reads
data.
"""

OPEN = ("epsilon", "noise_multiplier", "steps")
MEANING = {
    "dataset_size": "examples",
    "batch_size": "expected in a batch",
    "sample_rate": "chance of an example to join a batch",
    "steps": "noisy steps",
    "noise_multiplier": "noise over max_grad_norm",
    "epsilon": "budget",
    "delta": "chance that the bound fails",
}


@dataclass(frozen=True)
class Budget:
    """A run's privacy parameters, complete. Fields as in `MEANING`; `computed` names the one that followed."""

    dataset_size: int
    batch_size: int
    sample_rate: float
    steps: int
    noise_multiplier: float
    epsilon: float
    delta: float
    computed: str


def budget_parser() -> ArgumentParser:
    """The parser of `dither budget`."""
    parser = ArgumentParser(
        prog="dither budget",
        usage="dither budget --dataset_size N --batch_size B --delta D (two of: --epsilon --noise_multiplier --steps)",
        description="Plan a private run: give two of epsilon, noise and steps; get the third.",
        epilog=EXAMPLES,
        formatter_class=Formatter,
        exit_on_error=False,
    )
    parser.add_argument("--config", action=ActionConfigFile, help="a YAML file of these options; words after it win")
    parser.add_argument("--dataset_size", type=int | None, default=None, help="number of examples")
    parser.add_argument("--batch_size", type=int | None, default=None, help="expected number of examples in a batch")
    parser.add_argument("--delta", type=float | None, default=None, help="well below 1 / dataset_size")
    parser.add_argument("--epsilon", type=float | None, default=None, help="the budget")
    parser.add_argument(
        "--noise_multiplier", type=float | None, default=None, help="standard deviation in units of max_grad_norm"
    )
    parser.add_argument("--steps", type=int | None, default=None, help="noisy steps")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser


def run(words: Sequence[str]) -> int:
    """Run `dither budget`; returns the exit code."""
    options = parse(budget_parser(), words)
    _check(options)
    budget = complete(options)
    warning = warning_of(budget.delta, budget.dataset_size, "examples")
    if warning is not None:
        Console(stderr=True).print(f"{warning} Choose a smaller --delta.", style="bold red", highlight=False)
    if options.json:
        print(json.dumps(asdict(budget), indent=2))
    else:
        Console().print(_table(budget))
    return 0


def complete(options: Namespace) -> Budget:
    """Compute what was left open."""
    from dither.accounting import epsilon_for, noise_multiplier_for, steps_for

    rate = options.batch_size / options.dataset_size
    epsilon, noise, steps, delta = options.epsilon, options.noise_multiplier, options.steps, options.delta
    if noise is None:
        computed = "noise_multiplier"
        noise = noise_multiplier_for(epsilon, delta, rate, steps)
    elif steps is None:
        computed = "steps"
        steps = steps_for(epsilon, delta, rate, noise)
    else:
        computed = "epsilon"
    # Always said anew: what the run will spend, which is at most what was asked for.
    epsilon = epsilon_for(rate, noise, steps, delta)
    return Budget(options.dataset_size, options.batch_size, rate, steps, noise, epsilon, delta, computed)


def _check(options: Namespace) -> None:
    for name in ("dataset_size", "batch_size", "delta"):
        if options[name] is None:
            raise ConfigurationError(
                f"--{name} is missing ({MEANING[name]})", fix=f"add --{name}; see dither budget --help"
            )
    given = [name for name in OPEN if options[name] is not None]
    if len(given) != 2:
        raise ConfigurationError(
            f"{len(given)} of epsilon, noise_multiplier and steps are given: {', '.join(given) or 'none'}",
            fix="give two of them; the third is computed",
        )
    for name in ("dataset_size", "batch_size", *given):
        if not options[name] > 0:
            raise ConfigurationError(f"--{name} {options[name]} is not above 0", fix="give a positive number")
    if options.batch_size > options.dataset_size:
        raise BatchSizeError(
            f"--batch_size {options.batch_size} is larger than --dataset_size {options.dataset_size}",
            fix="an example joins a batch at most once: choose a batch of at most the dataset's size",
        )


def _table(budget: Budget) -> Table:
    table = Table(show_header=False, box=None, pad_edge=False)
    values = asdict(budget)
    for name, meaning in MEANING.items():
        value = values[name]
        mark = "<- computed" if name == budget.computed else ""
        style = "bold" if mark else ""
        table.add_row(name, f"{value:.6g}" if isinstance(value, float) else f"{value}", meaning, mark, style=style)
    return table
