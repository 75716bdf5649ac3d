"""Read a run's curves back from its TensorBoard log, the one place where they are kept."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

Points = Sequence[tuple[int, float]]
"""(step, value), by step."""


def read_curves(folder: Path) -> dict[str, Points]:
    """The curves of a TensorBoard folder, by name; each step once.

    A resumed run may have logged steps after its last save, and takes them again. TensorBoard's reader forgets those of
    the earlier session; should one be left, the later value of a step counts. Values that are not finite are left out.

    Args:
        folder: with event files; one that is missing or empty has no curves.
    """
    if not folder.is_dir():
        return {}
    from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

    log = EventAccumulator(str(folder), size_guidance={SCALARS: 0})  # 0: every point, not a sample of them
    log.Reload()
    curves: dict[str, Points] = {}
    for name in log.Tags()[SCALARS]:
        points = {int(event.step): float(event.value) for event in log.Scalars(name)}
        curves[name] = sorted((step, value) for step, value in points.items() if math.isfinite(value))
    return curves
