"""dither: train PyTorch models under differential privacy, exactly, whatever their forward takes."""

from dither.allocator import keep_memory
from dither.capture.compiled import compile
from dither.capture.declared import batched, constant
from dither.clipping import (
    ClippedSum,
    VerificationReport,
    clipped_sum,
    per_example_gradients,
    per_example_norms,
    verify,
)
from dither.errors import DitherError
from dither.rules import register_rule
from dither.training import PrivateTraining

__version__ = "0.1.0"

__all__ = [
    "ClippedSum",
    "DitherError",
    "PrivateTraining",
    "VerificationReport",
    "__version__",
    "batched",
    "clipped_sum",
    "compile",
    "constant",
    "keep_memory",
    "per_example_gradients",
    "per_example_norms",
    "register_rule",
    "verify",
]
