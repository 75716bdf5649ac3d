"""The curves of a run as charts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dither.report.chart import Chart, line_chart, smooth
from dither.telemetry import names
from dither.telemetry.curves import Points


@dataclass(frozen=True)
class Curve:
    """A chart, and whether the guarantee covers it."""

    chart: Chart
    private: bool


def charts_of(curves: Mapping[str, Points], *, public: bool) -> list[Curve]:
    """Epsilon, loss and clip fraction over the steps, of those that were logged.

    Args:
        curves: by name.
        public: only what the guarantee covers.
    """
    found = []
    for name, title in (
        (names.EPSILON, "Epsilon spent"),
        (names.LOSS, "Loss"),
        (names.CLIP_FRACTION, "Share of gradients clipped"),
    ):
        points = curves.get(name, ())
        if not points or (public and not names.is_private(name)):
            continue
        (first, start), (last, end) = points[0], points[-1]
        description = f"{title}, steps {first:,} to {last:,}: from {start:.4g} to {end:.4g}."
        lines = [("main", points)] if name == names.EPSILON else [("faint", points), ("main", smooth(points))]
        chart = line_chart(
            name.rpartition("/")[2],
            title,
            description,
            lines,
            y_least=None if name == names.LOSS else 0.0,
            y_most=1.0 if name == names.CLIP_FRACTION else None,
        )
        found.append(Curve(chart, names.is_private(name)))
    return found
