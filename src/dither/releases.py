"""What releases of class statistics share: distances that are clipped, labels that are checked, and their file."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from dither.accounting import Event, Ledger
from dither.errors import LabelError, LedgerError, OutputPathError, RunFolderError


def clip_distances(distances: Tensor, clip_norm: float) -> tuple[Tensor, Tensor]:
    """Scale each row's norm down to a bound.

    Args:
        distances: (b, ...).
        clip_norm: the bound.

    Returns:
        The rows, (b, ...), zero where they are not finite; and which are, (b,) bool: only these may be counted.
    """
    norms = distances.flatten(1).norm(dim=1)
    factors = (clip_norm / norms).clamp(max=1.0).view(-1, *[1] * (distances.dim() - 1))
    finite = norms.isfinite()
    return torch.where(finite.view_as(factors), distances * factors, 0.0), finite


def usual_clip_norm(entries: int) -> float:
    """A public guess of an image's distance from its middle, for pixels in [-1, 1]: 0.6 root of its entries."""
    return 0.6 * math.sqrt(entries)


def check_labels(labels: Tensor, num_classes: int) -> None:
    """Refuse labels outside the public set.

    Raises:
        LabelError: one is outside 0..num_classes-1.
    """
    low, high = (int(bound) for bound in torch.aminmax(labels))
    if low < 0 or high >= num_classes:
        raise LabelError(
            f"label {low if low < 0 else high} is outside 0..{num_classes - 1}", fix="give the right num_classes"
        )


def save_release(path: Path, tensors: Mapping[str, Tensor], events: Sequence[Event], private: bool) -> None:
    """Write a release and what it cost; a crash leaves no half of it.

    Raises:
        LedgerError: a release is there already.
        OutputPathError: the file cannot be written.
    """
    from safetensors.torch import save

    if path.exists():
        raise LedgerError(
            f"{path} holds a release already; a second one would have to be paid for too.",
            fix="load it, or give the new run another folder",
        )
    about = {"ledger": Ledger(events).to_json(), "private": str(private)}
    temporary = path.with_name(path.name + ".part")
    try:
        with open(temporary, "wb") as file:
            file.write(save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata=about))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise OutputPathError(f"{path} cannot be written: {error}", fix="give a path you may write") from error


def load_release(path: Path, names: Sequence[str]) -> tuple[list[Tensor], tuple[Event, ...], bool]:
    """Read the named tensors, the events and whether the noise was private, as `save_release` wrote them.

    Raises:
        RunFolderError: the file is missing or damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            about = file.metadata()
            tensors = [file.get_tensor(name) for name in names]
        return tensors, Ledger.from_json(about["ledger"]).events, about["private"] == "True"
    except (SafetensorError, OSError, KeyError, TypeError, LedgerError) as error:
        raise RunFolderError(
            f"{path} cannot be read as a release: {error}",
            fix="restore it from a copy; a second release is not in the run's ledger",
        ) from error
