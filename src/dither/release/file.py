"""A release and its file: tensors, and what they cost."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from dither.accounting import Event, Ledger
from dither.errors import LedgerError, OutputPathError, RunFolderError
from dither.files import replacing

Of = TypeVar("Of", bound="Release")


class Release:
    """What was released: dataclasses of this kind have tensors first, then these two.

    Attributes:
        events: what the release cost; hand them to `PrivateTraining(prior=...)`.
        private: whether the noise came from fresh entropy; a seed makes it predictable.
    """

    events: tuple[Event, ...]
    private: bool

    def tensors(self) -> dict[str, Tensor]:
        """The released tensors, by name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def save(self, path: Path) -> None:
        """Write the release to a file that `load` reads; a crash leaves no half of it.

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
        about = {"ledger": Ledger(self.events).to_json(), "private": str(self.private)}
        tensors = {name: tensor.contiguous() for name, tensor in self.tensors().items()}
        try:
            with replacing(path) as partial:
                partial.write_bytes(save(tensors, metadata=about))
        except OSError as error:
            raise OutputPathError(f"{path} cannot be written: {error}", fix="give a path you may write") from error

    @classmethod
    def load(cls: Callable[..., Of], path: Path) -> Of:
        """Read what `save` wrote.

        Raises:
            RunFolderError: the file is missing or damaged, or holds a release of another kind.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), framework="pt") as file:
                about, names = file.metadata(), file.keys()
                tensors = {name: file.get_tensor(name) for name in names}
            return cls(**tensors, events=Ledger.from_json(about["ledger"]).events, private=about["private"] == "True")
        except (SafetensorError, OSError, KeyError, TypeError, LedgerError) as error:
            raise RunFolderError(
                f"{path} cannot be read as a release: {error}",
                fix="restore it from a copy; a second release is not in the run's ledger",
            ) from error
