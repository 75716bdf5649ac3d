"""The progress of a training run: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 15.0


class TrainingProgress:
    """Shows step, epsilon spent and time left.

    Args:
        steps: of the whole run.
        done: already done before a resume.
        epsilon: already spent before a resume.
        console: where to show it.
    """

    def __init__(self, steps: int, done: int = 0, epsilon: float = 0.0, console: Console | None = None) -> None:
        self._console = console or Console()
        self._steps, self._done_before = steps, done
        self._start = self._last_line = time.monotonic()
        self._bar = Progress(
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(),
            TextColumn("epsilon {task.fields[epsilon]:.2f}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("train", total=steps, completed=done, epsilon=epsilon)

    def __enter__(self) -> TrainingProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def show(self, done: int, epsilon: float) -> None:
        """Show that `done` steps of the run are done and `epsilon` is spent."""
        self._bar.update(self._task, completed=done, epsilon=epsilon)
        now = time.monotonic()
        due = now - self._last_line >= SECONDS_BETWEEN_LINES or done == self._steps or done == self._done_before + 1
        if not self._console.is_terminal and due:
            left = (now - self._start) / (done - self._done_before) * (self._steps - done)
            self._console.print(f"step {done}/{self._steps}  epsilon {epsilon:.2f}  {left:.0f} s left", highlight=False)
            self._last_line = now
