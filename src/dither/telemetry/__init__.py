"""Values of a running training, step by step: written to TensorBoard, Weights & Biases and MLflow, and read again."""

from dither.telemetry.curves import read_curves
from dither.telemetry.names import CLIP_FRACTION, DROPPED, EPSILON, LOSS, SECONDS, is_private
from dither.telemetry.writers import Telemetry, Writers, check_installed

__all__ = [
    "CLIP_FRACTION",
    "DROPPED",
    "EPSILON",
    "LOSS",
    "SECONDS",
    "Telemetry",
    "Writers",
    "check_installed",
    "is_private",
    "read_curves",
]
