"""The file of a release: tensors, and what they cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from dither.accounting import Event, Ledger
from dither.errors import LedgerError, OutputPathError, RunFolderError
from dither.files import replacing


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
    try:
        with replacing(path) as partial:
            partial.write_bytes(save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata=about))
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
