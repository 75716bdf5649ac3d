"""The lines that a training run prints where there is no terminal."""

from __future__ import annotations

import io
import math

from rich.console import Console

from dither.cli.progress import TrainingProgress
from dither.training import Step


def test_what_tells_of_a_batch_is_marked():
    out = io.StringIO()
    with TrainingProgress(2, 10, console=Console(file=out)) as progress:
        progress.show(Step(1, 0.5, batch_size=0, loss=math.nan, clip_fraction=math.nan), 2.0)
        progress.show(Step(2, 0.7, batch_size=9, loss=1.0, clip_fraction=0.5), 2.0)
    empty, last = out.getvalue().splitlines()
    assert empty.startswith("step 1/2  epsilon 0.50  ") and empty.endswith("5 images/s, empty batch (non-private)")
    assert last == "step 2/2  epsilon 0.70  0 s left, 5 images/s, clip fraction 0.50 (non-private)"


def test_images_left_out_are_counted_and_a_step_without_any_is_warned_of_once():
    out = io.StringIO()
    with TrainingProgress(3, 10, console=Console(file=out)) as progress:
        progress.show(Step(1, 0.5, batch_size=9, loss=1.0, clip_fraction=0.5, dropped=2), 2.0)
        assert out.getvalue().rstrip().endswith("clip fraction 0.50, 2 left out (non-private)")
        progress.show(Step(2, 0.7, batch_size=9, loss=math.nan, clip_fraction=0.0, dropped=9), 2.0)
        progress.show(Step(3, 0.8, batch_size=9, loss=math.nan, clip_fraction=0.0, dropped=9), 2.0)
    assert out.getvalue().count("--recipe.learning_rate") == 1
