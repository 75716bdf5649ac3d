"""Clipping: norms to factors to clipped sums, for any model."""

from dither.clipping.clipped_sum import ClippedSum, clipped_sum, per_example_gradients, per_example_norms
from dither.clipping.verify import VerificationReport, verify

__all__ = [
    "ClippedSum",
    "VerificationReport",
    "clipped_sum",
    "per_example_gradients",
    "per_example_norms",
    "verify",
]
