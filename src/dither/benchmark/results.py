"""What a run of the benchmark found, as values; JSON in and out."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dither.errors import ConfigurationError

JAX_PLAIN = "jax_plain"
JAX_PRIVATE = "jax_privacy"


@dataclass(frozen=True)
class Spread:
    """A ratio over the rounds: its median, and the least and the largest."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(ratios: Iterable[float]) -> Spread:
        """The spread of some ratios."""
        found = list(ratios)
        return Spread(statistics.median(found), min(found), max(found))


@dataclass
class Cell:
    """One contender on one model.

    Attributes:
        error: the first line of why it cannot run the model; None if it can.
        seconds: of each round's step.
        first_seconds: of the first step of all.
        distance: of its clipped sum from dither's, relative, noise off; None for the plain step.
        peak_mib: peak memory of a later step, above what was resident before there were gradients.
        first_peak_mib: the same of the first step.
        process_mib: peak memory of the whole process in that later step, with code, model and data.
    """

    error: str | None = None
    seconds: list[float] = field(default_factory=list)
    first_seconds: float | None = None
    distance: float | None = None
    peak_mib: float | None = None
    first_peak_mib: float | None = None
    process_mib: float | None = None


@dataclass
class Row:
    """One model under every contender.

    Attributes:
        model: its registered name.
        sizes: in words.
        cells: by contender.
    """

    model: str
    sizes: str
    cells: dict[str, Cell]

    @property
    def key(self) -> str:
        """What two runs must agree on to be compared."""
        return f"{self.model}: {self.sizes}"

    def baseline(self, name: str) -> Cell | None:
        """The plain step that a contender is divided by: jax-privacy's is JAX's own."""
        return self.cells.get(JAX_PLAIN if name == JAX_PRIVATE else "plain")

    def time(self, name: str) -> Spread | None:
        """Step time over the plain step of the same round."""
        cell, plain = self.cells.get(name), self.baseline(name)
        if cell is None or plain is None or not cell.seconds or not plain.seconds:
            return None
        return Spread.of(a / b for a, b in zip(cell.seconds, plain.seconds, strict=True))

    def first(self, name: str) -> float | None:
        """The first step over a later plain step."""
        cell, plain = self.cells.get(name), self.baseline(name)
        if cell is None or plain is None or cell.first_seconds is None or not plain.seconds:
            return None
        return cell.first_seconds / statistics.median(plain.seconds)

    def memory(self, name: str) -> float | None:
        """Peak memory over the plain step's."""
        cell, plain = self.cells.get(name), self.baseline(name)
        if cell is None or plain is None or cell.peak_mib is None or not plain.peak_mib:
            return None
        return cell.peak_mib / plain.peak_mib

    def process(self, name: str) -> float | None:
        """Peak memory of the whole process over the plain step's."""
        cell, plain = self.cells.get(name), self.baseline(name)
        if cell is None or plain is None or cell.process_mib is None or not plain.process_mib:
            return None
        return cell.process_mib / plain.process_mib


@dataclass
class Growth:
    """Step time along one size.

    Attributes:
        axis: batch, tokens, width, views or depth.
        base: the sizes that stayed, in words.
        values: along the axis.
        seconds: by contender (plain, auto), of each value's step: each round's.
        exponents: by contender, fitted; nothing where there was only one value.
    """

    axis: str
    base: str
    values: list[int]
    seconds: dict[str, list[list[float]]]
    exponents: dict[str, float]

    def ratios(self) -> list[Spread]:
        """Dither auto over plain, of each value."""
        pairs = zip(self.seconds["auto"], self.seconds["plain"], strict=True)
        return [Spread.of(a / b for a, b in zip(ours, plain, strict=True)) for ours, plain in pairs]


@dataclass
class Explained:
    """What the plan expected of one use, and what it took, in one micro-batch.

    Attributes:
        parameter: its name.
        operation: that uses it.
        strategy: that was chosen.
        held_bytes: kept until the sum.
        predicted: seconds, if the plan says so.
        measured: seconds spent forming, taking norms and adding the weighted sum; the median of some steps.
    """

    parameter: str
    operation: str
    strategy: str
    held_bytes: int
    predicted: float | None
    measured: float


@dataclass
class Results:
    """All of a run.

    Attributes:
        about: machine, versions, date, and the settings that the figures depend on.
        rows: a model each.
        growth: a sweep each.
        explained: by model.
        failed: sweeps and plans that could not be measured, and why.
    """

    about: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    growth: list[Growth] = field(default_factory=list)
    explained: dict[str, list[Explained]] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)

    def save(self, path: Path) -> None:
        """Write JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @staticmethod
    def load(path: Path) -> Results:
        """Read what `save` wrote.

        Raises:
            ConfigurationError: no such file, or another's.
        """
        try:
            read = json.loads(path.read_text())
            rows = [
                Row(row["model"], row["sizes"], {n: Cell(**cell) for n, cell in row["cells"].items()})
                for row in read["rows"]
            ]
            growth = [Growth(**part) for part in read["growth"]]
            explained = {name: [Explained(**use) for use in uses] for name, uses in read["explained"].items()}
            return Results(read["about"], rows, growth, explained, list(read["failed"]))
        except OSError as error:
            raise ConfigurationError(f"cannot read {path}: {error.strerror}", fix="give a file of --save") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigurationError(
                f"{path} was not written by `dither bench --save`: {type(error).__name__} {error}",
                fix="give a file of --save",
            ) from None
