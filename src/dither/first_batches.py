"""The comparison of a run's first batches with plain autograd."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dither.clipping.verify import RandomState, verify
from dither.errors import CaptureError

COMPARED = 4
"""Examples of a batch, at most."""
_BATCHES = 3


class FirstBatches:
    """Compares a few examples of the first batch, and of up to two more while some parameters have a zero gradient.

    Args:
        wanted: whether anything is compared at all.
        device: whose random numbers are put back afterwards.
    """

    def __init__(self, wanted: bool, device: torch.device) -> None:
        self.wanted, self._device, self._left = wanted, device, _BATCHES
        self.found: dict[str, Any] = {"exact": None}
        """What came of it the last time, for certificates."""

    @property
    def due(self) -> bool:
        """Whether this batch is to be compared."""
        return self.wanted and self._left > 0

    def compare(
        self, model: nn.Module, load: Callable[[], Callable[[], Tensor]], examples: int, strategy: str, step: int
    ) -> None:
        """Compare the gradients of these examples with plain autograd's; random numbers go on as if nothing was drawn.

        Args:
            model: what is trained.
            load: reads so many examples, and gives what computes their losses (b,).
            examples: b.
            strategy: that the run sums with.
            step: completed before.

        Raises:
            CaptureError: the gradients are not exact.
        """
        state = RandomState([self._device])
        try:
            report = verify(model, load(), (strategy,))
        finally:
            state.restore()
        self.found = {
            "exact": report.exact,
            "max_relative_error": min(report.max_relative_error, sys.float_info.max),  # JSON knows no infinity
            "examples": examples,
            "first_step": step,
        }
        if not report.exact:
            raise CaptureError(
                f"The recorded per-example gradients differ from autograd's by {report.max_relative_error:.2e} "
                f"relative on the first {examples} examples.\n{report}",
                fix="report this model to dither; if the loss draws its own random numbers, draw them from torch",
            )
        self.found |= {
            "tolerance": report.tolerance,
            "parameters": len(report.errors),
            "parameters_without_gradient": len(report.unused) + len(report.zero),
        }
        self._left = self._left - 1 if report.zero else 0
