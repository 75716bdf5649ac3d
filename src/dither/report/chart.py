"""Line charts as geometry; the template draws them as SVG, in the page's own colours."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

Points = Sequence[tuple[float, float]]

WIDTH, HEIGHT = 360, 210
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 10, 10, 38
_MOST_POINTS = 600
_SMOOTH_POINTS = 60


@dataclass(frozen=True)
class Line:
    """One line: `kind` is its CSS class, `path` the SVG path."""

    kind: str
    path: str


@dataclass(frozen=True)
class Tick:
    """A labelled place on an axis."""

    at: float
    label: str


@dataclass(frozen=True)
class Chart:
    """A chart, in units of its view box.

    Attributes:
        name: unique on the page.
        title: what it shows.
        description: the same in words, for who cannot see it.
        x_label: of the horizontal axis.
        lines: back to front.
        x_ticks, y_ticks: the axes' marks.
    """

    name: str
    title: str
    description: str
    x_label: str
    lines: tuple[Line, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    width: int = WIDTH
    height: int = HEIGHT
    left: int = _LEFT
    right: int = WIDTH - _RIGHT
    top: int = _TOP
    bottom: int = HEIGHT - _BOTTOM


def line_chart(
    name: str,
    title: str,
    description: str,
    lines: Sequence[tuple[str, Points]],
    *,
    x_label: str = "step",
    y_least: float | None = 0.0,
    y_most: float | None = None,
) -> Chart:
    """Lay lines out.

    Args:
        name: unique on the page.
        title: what it shows.
        description: the same in words.
        lines: (CSS class, points); at least one point in all.
        x_label: of the horizontal axis.
        y_least: the vertical axis begins there; None for the least value.
        y_most: and ends there; None for the largest.
    """
    xs = [x for _, points in lines for x, _ in points]
    ys = [y for _, points in lines for _, y in points]
    x_ticks = ticks(min(xs), max(xs))
    y_ticks = ticks(min(ys) if y_least is None else y_least, max(ys) if y_most is None else y_most)
    x_low, x_high = min(xs), max(max(xs), min(xs) + 1e-9)
    y_low, y_high = y_ticks[0], y_ticks[-1]

    def across(x: float) -> float:
        return round(_LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - _LEFT - _RIGHT), 1)

    def up(y: float) -> float:
        return round(HEIGHT - _BOTTOM - (y - y_low) / (y_high - y_low) * (HEIGHT - _TOP - _BOTTOM), 1)

    def path(points: Points) -> str:
        stride = math.ceil(len(points) / _MOST_POINTS)
        kept = [*points[::stride], points[-1]]
        return "M" + "L".join(f"{across(x)} {up(y)}" for x, y in kept)

    return Chart(
        name,
        title,
        description,
        x_label,
        tuple(Line(kind, path(points)) for kind, points in lines if points),
        tuple(Tick(across(x), _label(x, x_ticks)) for x in x_ticks if x_low <= x <= x_high),
        tuple(Tick(up(y), _label(y, y_ticks)) for y in y_ticks),
    )


def smooth(points: Points) -> Points:
    """Means of runs of neighbouring points: at most 60 of them."""
    size = math.ceil(len(points) / _SMOOTH_POINTS)
    runs = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(x for x, _ in run) / len(run), sum(y for _, y in run) / len(run)) for run in runs]


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers, evenly spaced: the first at most `low`, the last at least `high`; about `most` of them."""
    if not high > low:
        low, high = low - 0.5 * (abs(low) or 1.0), low + 0.5 * (abs(low) or 1.0)
    rough = (high - low) / most
    unit = 10.0 ** math.floor(math.log10(rough))
    step = unit * next(factor for factor in (1, 2, 5, 10) if factor * unit >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def _label(value: float, every: Sequence[float]) -> str:
    step = every[1] - every[0]
    if abs(value) >= 1e5 or step < 1e-4:
        return f"{value:.3g}"
    return f"{value:.{max(0, -math.floor(math.log10(step) + 1e-9))}f}"
