"""The progress of a training run: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections import deque
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from dither.training import Step

SECONDS_BETWEEN_LINES = 15.0
RECENT_STEPS = 20
ALL_LEFT_OUT = (
    "Every image of a step was left out, for its gradient is not finite (non-private): steps now spend epsilon and "
    "learn nothing. Stop with Ctrl-C, and choose a smaller --recipe.learning_rate."
)


class TrainingProgress:
    """Shows step and epsilon spent; and, marked as not private, time left, images a second, the clip fraction, and
    images left out.

    How long a step takes tells how large its batch was.

    Args:
        steps: of the whole run.
        expected_batch_size: images in a step, on average; a public constant.
        done: already done before a resume.
        epsilon: already spent before a resume.
        console: where to show it.
    """

    def __init__(
        self,
        steps: int,
        expected_batch_size: float,
        done: int = 0,
        epsilon: float = 0.0,
        console: Console | None = None,
    ) -> None:
        self._console = console or Console()
        self._steps, self._expected, self._first = steps, expected_batch_size, done + 1
        self._start = self._last_line = time.monotonic()
        self._recent: deque[float] = deque(maxlen=RECENT_STEPS)
        self._warned = False
        self._bar = Progress(
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(bar_width=20),
            TextColumn("epsilon {task.fields[epsilon]:.2f}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[more]}"),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("train", total=steps, completed=done, epsilon=epsilon, more="")

    def __enter__(self) -> TrainingProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def show(self, step: Step, seconds: float) -> None:
        """Show a completed step that took so many seconds."""
        self._recent.append(seconds)
        speed = self._expected * len(self._recent) / max(sum(self._recent), 1e-9)
        clipped = f"clip fraction {step.clip_fraction:.2f}" if step.batch_size else "empty batch"
        left_out = f", {step.dropped} left out" if step.dropped else ""
        more = f"{speed:,.0f} images/s, {clipped}{left_out} (non-private)"
        if not self._warned and 0 < step.batch_size == step.dropped:
            self._warned = True
            self._console.print(ALL_LEFT_OUT, style="bold red", highlight=False, soft_wrap=True)
        self._bar.update(self._task, completed=step.index, epsilon=step.epsilon, more=more)
        now = time.monotonic()
        due = now - self._last_line >= SECONDS_BETWEEN_LINES or step.index in (self._first, self._steps)
        if not self._console.is_terminal and due:
            left = (now - self._start) / (step.index - self._first + 1) * (self._steps - step.index)
            line = f"step {step.index}/{self._steps}  epsilon {step.epsilon:.2f}  {left:.0f} s left, {more}"
            self._console.print(line, highlight=False, soft_wrap=True)
            self._last_line = now
