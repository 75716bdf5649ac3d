"""Ctrl-C between steps, so that no step is half done."""

from __future__ import annotations

import signal
import sys
from types import FrameType, TracebackType
from typing import Any


class StopRequest:
    """While active, the first Ctrl-C (or SIGTERM) only sets `wanted`; the second interrupts at once.

    A step that stops half-way would leave weights, optimizer and ledger in disagreement.
    """

    def __init__(self) -> None:
        self.wanted = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.wanted:
            raise KeyboardInterrupt
        self.wanted = True
        print(
            "\nStopping after this step. Once more stops at once and loses the steps since the last save.",
            file=sys.stderr,
        )
