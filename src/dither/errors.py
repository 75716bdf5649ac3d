"""Every error dither raises. Each message says what happened, where, and the usual fix."""

from __future__ import annotations


class DitherError(Exception):
    """Base of all dither errors.

    Args:
        what: what happened and where, with the names and values involved.
        fix: what to do about it.
    """

    def __init__(self, what: str, *, fix: str) -> None:
        self.what = what
        self.fix = fix
        super().__init__(f"{what}\n  Fix: {fix}")


def reason_of(error: Exception) -> str:
    """The first line of what another library's error says, or its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


# --- arguments and inputs -------------------------------------------------------------------


class ConfigurationError(DitherError, ValueError):
    """An argument or option has a value that cannot work."""


class UnknownStrategyError(ConfigurationError):
    """The strategy is not one of auto, hold, ghost, tile, two_pass."""


class UnknownClippingError(ConfigurationError):
    """The clipping function is not known."""


class BatchSizeError(ConfigurationError):
    """The expected batch size does not fit the dataset."""


class MemoryBudgetError(ConfigurationError):
    """Per-example gradients that have to be formed take more memory than the budget."""


class EmptyDatasetError(ConfigurationError):
    """The dataset has no examples."""


class BudgetError(ConfigurationError):
    """No noise multiplier or number of steps meets the requested privacy budget."""


class LabelError(ConfigurationError):
    """A class label is outside the model's range."""


class DataError(DitherError):
    """A data set cannot be read, or is not what it should be."""


class NoHeldOutPartError(DataError):
    """A data set has no part that is not for training."""


class BrokenImagesError(DataError):
    """Some images of a data set cannot be read; each has a name."""


class MissingPackageError(DitherError, ImportError):
    """An optional package is needed and not installed."""


class RunFolderError(DitherError):
    """A run folder is missing, corrupt, or was not written by dither."""


class FolderInUseError(DitherError):
    """Another process trains in a folder, or evaluates into it."""


class CheckpointError(DitherError):
    """A model's file or folder is missing, damaged, or of an architecture that does not fit."""


class OutputPathError(DitherError):
    """A path cannot be written."""


class CertificateError(DitherError):
    """A certificate cannot be read."""


# --- what the recorder refuses ---------------------------------------------------------------


class CaptureError(DitherError):
    """The recorded gradients could not be proved exact."""


class LossShapeError(CaptureError, ValueError):
    """The loss is not one number per example, shape (B,)."""


class CoupledExamplesError(CaptureError):
    """The loss of one example depends on another example."""


class ExampleAxisError(CaptureError):
    """Which axis carries the examples could not be decided at a parameter's use."""


class UnsupportedOpError(CaptureError):
    """A parameter is used by an operation that has no exact rule."""


class CoverageError(CaptureError):
    """A parameter received gradient outside the recorder."""


class SavedInputChangedError(CaptureError):
    """A tensor that a rule needs was changed in place after it was recorded."""


class BufferUpdateError(CaptureError):
    """A module buffer is updated from the examples."""


class NestedRecorderError(CaptureError):
    """A recorder or a backward pass was started inside another recording."""


# --- private training ------------------------------------------------------------------------


class DivergedError(DitherError):
    """A step left weights that are not finite; nothing can be learned from there."""


class LedgerError(DitherError):
    """The ledger and the run disagree."""
