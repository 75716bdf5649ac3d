"""The names of logged values. What was computed from data without noise says so in its name, wherever it is shown."""

from __future__ import annotations

from typing import Final

NOT_PRIVATE: Final = "non-private/"

EPSILON: Final = "privacy/epsilon"
"""Spent so far. A function of public constants alone."""
LOSS: Final = f"{NOT_PRIVATE}loss"
CLIP_FRACTION: Final = f"{NOT_PRIVATE}clip-fraction"
DROPPED: Final = f"{NOT_PRIVATE}dropped"
"""Examples left out of a step because their gradient was not finite."""
SECONDS: Final = f"{NOT_PRIVATE}step-seconds"
"""Of one step. Longer for a larger batch, and how large a batch was drawn is not private."""


def is_private(name: str) -> bool:
    """Whether the guarantee covers the value of this name."""
    return not name.startswith(NOT_PRIVATE)
