"""What a delta promises, in words, before anything is spent at it."""

from __future__ import annotations


def warning_of(delta: float, size: int, examples: str) -> str | None:
    """That a delta promises nothing for this many examples, as the report would say afterwards; None if it does.

    Args:
        delta: of the run.
        size: number of examples.
        examples: what they are, in the plural.
    """
    if delta < 1 / size:
        return None
    return f"Delta {delta:g} is not below 1 / {size:,} {examples}: publishing one of them at random would meet it."
