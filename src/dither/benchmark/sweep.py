"""How step time grows with one size at a time, and the exponent of that growth."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace

from dither.benchmark.contenders import contender
from dither.benchmark.models import Sizes, dit
from dither.benchmark.results import Growth

AXES: dict[str, tuple[int, ...]] = {
    "batch": (4, 8, 16, 32),
    "tokens": (64, 144, 256, 576, 1024, 4096),
    "width": (128, 256, 384, 512),
    "views": (1, 2, 4, 8, 16, 32),
    "depth": (1, 2, 4, 8),
}
"""The values of each size; the others stay at BASE."""

BASE = Sizes(width=256, depth=2, tokens=64, batch=8)

SMOKE_AXES: dict[str, tuple[int, ...]] = {
    "batch": (2, 4),
    "tokens": (16, 64),
    "width": (32, 64),
    "views": (1, 2),
    "depth": (1, 2),
}
SMOKE_BASE = Sizes(width=32, depth=1, tokens=16, batch=2)

COMPARED = ("plain", "auto")


def exponent(values: Sequence[float], seconds: Sequence[float]) -> float:
    """The p of seconds = c * value^p, by least squares in logarithms.

    Args:
        values: positive, at least two of them different.
        seconds: positive, as many.
    """
    x, y = [math.log(v) for v in values], [math.log(s) for s in seconds]
    middle_x, middle_y = sum(x) / len(x), sum(y) / len(y)
    spread = sum((a - middle_x) ** 2 for a in x)
    return sum((a - middle_x) * (b - middle_y) for a, b in zip(x, y, strict=True)) / spread


def sweep(axis: str, *, microbatches: int, pairs: int, warm_up: int, smoke: bool = False) -> Growth:
    """Time the plain step and dither auto of a DiT along one size, all of them in turns in this process.

    Args:
        axis: of AXES.
        microbatches: in a step.
        pairs: rounds that count.
        warm_up: steps of each before them, at least one.
        smoke: tiny sizes.
    """
    base, values = (SMOKE_BASE, SMOKE_AXES[axis]) if smoke else (BASE, AXES[axis])
    points = [dit(replace(base, **{axis: value})) for value in values]
    running = [[contender(name, point, microbatches) for name in COMPARED] for point in points]
    for pair in running:
        for one in pair:
            for _ in range(warm_up):
                one.step()
    seconds: dict[str, list[list[float]]] = {name: [[] for _ in values] for name in COMPARED}
    for number in range(pairs):
        for place, pair in enumerate(running):
            for name, one in list(zip(COMPARED, pair, strict=True))[:: -1 if number % 2 else 1]:
                start = time.perf_counter()
                one.step()
                seconds[name][place].append(time.perf_counter() - start)
    fitted = {name: exponent(values, [statistics.median(taken) for taken in seconds[name]]) for name in COMPARED}
    return Growth(axis, str(base), list(values), seconds, fitted)
