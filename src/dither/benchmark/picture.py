"""Results as a picture: a mark for each contender and model, the plain step at one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dither.benchmark.contenders import OURS
from dither.benchmark.results import Results, Row
from dither.benchmark.table import TITLES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_OURS = ("#0b5394", "#3d85c6", "#6fa8dc", "#9fc5e8", "#b7cde5")
_OTHERS = ("#cc4125", "#e69138", "#f1c232", "#6aa84f", "#8e7cc3")


def draw(results: Results, path: Path) -> None:
    """Write the picture of step times and, where measured, of peak memory; the format is the file's ending.

    Times are medians over rounds, with a line from the least to the largest.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = results.rows
    names = [n for n in TITLES if n != "plain" and any(row.time(n) is not None for row in rows)]
    with_memory = any(row.memory(n) is not None for row in rows for n in names)
    figure, axes = pyplot.subplots(
        1, 2 if with_memory else 1, figsize=(11 if with_memory else 6.5, 1.5 + 0.17 * len(names) * len(rows)),
        sharey=True, squeeze=False, layout="constrained",
    )  # fmt: skip
    colours = _colours()
    for place, title in enumerate(("step time / plain step", "peak memory / plain step")[: 1 + with_memory]):
        axis = axes[0][place]
        for number, name in enumerate(names):
            height = [i + (number + 0.5) / len(names) * 0.84 + 0.08 for i in range(len(rows))]
            _marks(axis, rows, height, name, colours[name], memory=place == 1)
        axis.axvline(1.0, color="black", linewidth=0.8)
        axis.set_xscale("log")
        axis.set_xlabel(title)
        axis.grid(axis="x", which="both", alpha=0.25)
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter("{x:g}")
        axis.tick_params(axis="x", which="both", labelsize=8)
        for line in range(1, len(rows)):
            axis.axhline(line, color="grey", linewidth=0.5)
    axes[0][0].set_yticks([i + 0.5 for i in range(len(rows))], [f"{r.model}\n{_short(r.sizes)}" for r in rows])
    axes[0][0].set_ylim(len(rows), 0)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=5, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _marks(axis: Axes, rows: Sequence[Row], height: Sequence[float], name: str, colour: str, memory: bool) -> None:
    x, y, less, more = [], [], [], []
    for row, place in zip(rows, height, strict=True):
        if memory:
            ratio = row.memory(name)
            low = high = ratio
        else:
            found = row.time(name)
            ratio, low, high = (None,) * 3 if found is None else (found.median, found.low, found.high)
        if ratio is not None and low is not None and high is not None and ratio > 0:
            x.append(ratio)
            y.append(place)
            less.append(ratio - low)
            more.append(high - ratio)
    axis.errorbar(x, y, xerr=(less, more), fmt="o", color=colour, markersize=5, elinewidth=1, label=TITLES[name])


def _colours() -> dict[str, str]:
    """A contender's colour is the same in every picture."""
    ours = [name for name in TITLES if name in OURS]
    others = [name for name in TITLES if name not in (*OURS, "plain")]
    return dict(zip(ours, _OURS, strict=True)) | dict(zip(others, _OTHERS, strict=True))


def _short(sizes: str) -> str:
    """The sizes on two lines."""
    first, second, *rest = sizes.split(", ")
    return f"{first}, {second}\n{', '.join(rest)}"
