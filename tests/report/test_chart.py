"""Axes have round numbers that hold the data."""

from __future__ import annotations

import pytest

from dither.report.chart import line_chart, smooth, ticks


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 10, [0, 2, 4, 6, 8, 10]),
        (1, 20, [0, 5, 10, 15, 20]),
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (-3, 3, [-4, -2, 0, 2, 4]),
    ],
)
def test_ticks(low, high, expected):
    assert ticks(low, high) == pytest.approx(expected)


@pytest.mark.parametrize("value", [0.0, 5.0, -2.5, 1e9])
def test_one_point_is_a_chart(value):
    chart = line_chart("one", "One", "One point.", [("main", [(3.0, value)])], y_least=None)
    assert len(chart.y_ticks) >= 2 and all(tick.label for tick in chart.y_ticks)


def test_points_lie_between_the_axes_and_labels_differ():
    points = [(float(i), 0.001 * (i % 7)) for i in range(5000)]
    chart = line_chart("many", "Many", "Many points.", [("faint", points), ("main", smooth(points))])
    places = [tuple(map(float, pair.split())) for pair in chart.lines[0].path[1:].split("L")]
    assert len(places) <= 602
    assert all(chart.left <= x <= chart.right and chart.top <= y <= chart.bottom for x, y in places)
    labels = [tick.label for tick in chart.y_ticks]
    assert len(set(labels)) == len(labels)


def test_smoothing_keeps_the_mean():
    assert [y for _, y in smooth([(i, float(i)) for i in range(120)])][:2] == [0.5, 2.5]
