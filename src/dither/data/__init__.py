"""Data sets for private training."""

from dither.data.digits import digits as digits

__all__ = ["digits"]
