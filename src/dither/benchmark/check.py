"""Has dither become slower or hungrier than a baseline that was kept?"""

from __future__ import annotations

from collections.abc import Iterator

from dither.benchmark.contenders import OURS
from dither.benchmark.results import Results, Row
from dither.benchmark.table import TITLES
from dither.errors import ConfigurationError

TOLERANCE = 0.10
"""By how much a ratio may grow."""


def regressions(found: Results, baseline: Results) -> list[str]:
    """Every ratio of dither's that grew by more than TOLERANCE, and every model that it no longer runs, in words.

    Models and contenders that only one of the two has are left out.

    Raises:
        ConfigurationError: the two have nothing in common, or their steps are of different sizes.
    """
    steps = [results.about["settings"]["microbatches"] for results in (found, baseline)]
    if steps[0] != steps[1]:
        raise ConfigurationError(
            f"steps have {steps[0]} micro-batches, those of the baseline {steps[1]}",
            fix=f"--microbatches {steps[1]}",
        )
    kept = {row.key: row for row in baseline.rows}
    pairs = [(row, kept[row.key]) for row in found.rows if row.key in kept]
    common = [(now, then, name) for now, then in pairs for name in OURS if name in now.cells and name in then.cells]
    if not common:
        raise ConfigurationError(
            f"nothing to compare: the baseline has {'; '.join(kept) or 'no models'}",
            fix="measure the same models, sizes and contenders",
        )
    return [said for now, then, name in common for said in _grown(now, then, name)]


def _grown(now: Row, then: Row, name: str) -> Iterator[str]:
    what = f"{TITLES[name]} on {now.key}"
    if now.cells[name].error is not None:
        if then.cells[name].error is None:
            yield f"{what}: {now.cells[name].error}"
        return
    times = [row.time(name) for row in (now, then)]
    ratios = {
        "step time": [None if spread is None else spread.median for spread in times],
        "peak memory": [now.memory(name), then.memory(name)],
    }
    for measure, (new, old) in ratios.items():
        if new is not None and old is not None and new > old * (1 + TOLERANCE):
            yield f"{what}: {measure} is {new:.2f} of the plain step's, it was {old:.2f}"
