"""How many examples of a logical batch are computed at once."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch

from dither.clipping.machine import Rates, free_memory
from dither.clipping.plan import Plan
from dither.errors import ConfigurationError

_FIRST = 4  # examples in the first micro-batch of "auto"
_LARGEST = {"cuda": 256}
_LARGEST_ELSEWHERE = 512
_TIMED_FROM = 64  # on a CPU: beyond it a cache may lose more than fewer, larger operations win
_TIMINGS = 4  # micro-batches of a size that are timed; the first, which proves the examples' places, does not count
_FASTER = 0.95  # of an example's time at half the size: what a larger size has to reach
_LADDER = 8  # sizes below the current one that remainders take, so that few sizes have to be proved
_SEEDED = 32  # "auto" under a seed, where splitting by measured memory would change the rounding
_REFUSALS = 3
_SHARE = 0.5  # of the free memory that a micro-batch may take
_DEARER = 1.02  # by how much an example's predicted time may rise with the size: less is a rounding of the prediction


class MicrobatchSize:
    """How many examples to compute at once: performance only, the mechanism does not know it.

    A number is kept. "auto" starts at 4 examples and doubles while the most that a micro-batch of this size added to
    the process's peak of memory, taken twice, fits in half of what is free. It stops growing at the third micro-batch
    for which this does not hold. Where the plan predicts more time for an example than at half the size, because what
    no longer fits the memory budget is computed twice, it goes back to that half. On a CPU it grows beyond 64 only
    while an example takes less time than at half the size, as measured. At most 256 on CUDA, 512 elsewhere. Nothing is
    computed only to measure it; while it grows, the system's record of the peak (VmHWM on Linux, torch's on CUDA) is
    reset. Under a seed "auto" is 32, so that a resumed run rounds alike. What the memory budget refuses is halved.

    A remainder is cut in two: a multiple of an eighth of the size, and the rest. Poisson batches have another size
    each step, and every new size of a micro-batch costs a proof of the examples' places; so there are few of them.

    Args:
        size: a number of examples, or "auto".
        device: where the model is.
        seeded: whether the run has a seed.

    Raises:
        ConfigurationError: size is neither "auto" nor an integer of at least 1.
    """

    def __init__(self, size: int | str, device: torch.device, *, seeded: bool = False) -> None:
        valid = size == "auto" or (isinstance(size, int) and not isinstance(size, bool) and size >= 1)
        if not valid:
            raise ConfigurationError(
                f"microbatch_size must be 'auto' or an integer of at least 1; it is {size!r}.", fix="use 'auto'"
            )
        self._device = device
        self._automatic = size == "auto"
        self._growing = self._automatic and not seeded
        self._given, self._again = 0, False
        self._refusals = 0
        self._cheapest = float("inf")
        self._cost: float | None = None
        self._rates: Rates | None = None
        self._largest = _LARGEST.get(device.type, _LARGEST_ELSEWHERE)
        self._added = 0.0
        self._timings: list[float] = []
        self._at_half = float("inf")
        self.current = size if isinstance(size, int) else (_SEEDED if seeded else _FIRST)

    def split(self, indices: Sequence[int] | np.ndarray[Any, Any]) -> Iterator[np.ndarray[Any, Any]]:
        """Cut a logical batch into micro-batches; the size may grow between them."""
        rest = np.asarray(indices)
        while len(rest):
            size = self._fitting(len(rest))
            before = _memory(self._device) if self._growing and size == self.current else None
            began, self._given = time.perf_counter(), size
            yield rest[:size]
            if self._again:
                self._again = False
                continue
            rest = rest[size:]
            if before is not None:
                self._timings.append((time.perf_counter() - began) / size)
                self._grow(before)

    def halve(self) -> bool:
        """Have `split` give the examples that it gave last once more, half as many at once, and grow no further.

        Returns:
            Whether it will: a single example is not cut, and a number that the user chose is kept.
        """
        if not self._automatic or self._given < 2:
            return False
        self.current, self._growing, self._again = self._given // 2, False, True
        return True

    def _fitting(self, left: int) -> int:
        """The size of the next micro-batch, with so many examples left."""
        if left >= self.current:
            return self.current
        return left - left % max(1, self.current // _LADDER) or left

    def planned(self, plan: Plan) -> None:
        """Take note of the time that the plan predicts for the micro-batch that `split` gave last."""
        if plan.rates != self._rates:  # small work is planned by other speeds: their times do not compare
            self._rates, self._cheapest = plan.rates, float("inf")
        self._cost = plan.seconds / self.current

    def _grow(self, before: tuple[float, float]) -> None:
        if self._cost is not None:
            if self._cost > _DEARER * self._cheapest:
                self._go_back()
                return
            self._cheapest, self._cost = min(self._cost, self._cheapest), None
        used, free = before
        added = max(_peak(self._device) - used, 0.0)
        # Only a size's first micro-batch adds what stays, in buffers or an allocator that keeps memory; those of the
        # first size also add what any size does, once.
        self._added = added if self.current == _FIRST else max(self._added, added)
        if self.current >= _TIMED_FROM and self._device.type != "cuda" and not self._pays():
            return
        if 2.0 * self._added <= _SHARE * free:
            self._growing = self.current < self._largest
            timed = self._timings[1:] if self.current >= _TIMED_FROM else []
            self._at_half, self._timings = min(timed, default=float("inf")), []
            self.current, self._added = min(2 * self.current, self._largest), 0.0
        else:
            self._refusals += 1
            self._growing = self._refusals < _REFUSALS

    def _pays(self) -> bool:
        """Whether an example was faster in micro-batches of this size than at half of it, once enough were timed."""
        if len(self._timings) < _TIMINGS:
            return False
        if min(self._timings[1:]) > _FASTER * self._at_half:
            self._go_back()
            return False
        return True

    def _go_back(self) -> None:
        self.current, self._growing = self.current // 2, False


def _memory(device: torch.device) -> tuple[float, float]:
    """Bytes in use by this process and bytes free."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        allocated = torch.cuda.memory_allocated(device)
        reserved = torch.cuda.memory_reserved(device) - allocated
        return float(allocated), free_memory(device) + float(reserved)
    with suppress(OSError), open("/proc/self/clear_refs", "w") as control:
        control.write("5")  # proc(5): resets VmHWM; else the peak is the whole life's, which errs towards small sizes
    return _status("VmRSS:"), free_memory(device)


def _peak(device: torch.device) -> float:
    """Most bytes this process has used at once; since `_memory` where that can be reset."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    return _status("VmHWM:")


def _status(field: str) -> float:
    """A field in kilobytes of this process's status, in bytes; zero where there is none."""
    with suppress(OSError), open("/proc/self/status") as lines:
        return next((1024.0 * float(line.split()[1]) for line in lines if line.startswith(field)), 0.0)
    return 0.0
