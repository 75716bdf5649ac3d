"""The run folder: what a training run leaves on disk, and how it is found again.

run.json            marks the folder as a run; the images' size, channels and classes
config.yaml         every option; `dither train --config` repeats the run with it
model.safetensors   raw weights          ema.safetensors   their running average
state/              what `dither train --resume` needs
tensorboard/        curves               telemetry.json    ids at other services, if any
samples.png         labelled grid        samples/          grids drawn on the way
certificate.json    the privacy claim    report.html       all of it on one page
class_statistics.safetensors, .png   noisy means, Gaussians or mixtures of the classes, where the run began with them
model.json          sizes of a model from a checkpoint
public.json         what was taken as public: that checkpoint, data for pretraining; and what the private steps train
evaluation.json, evaluation/   scores of `dither evaluate`; evaluation.lock is held while it works
beginning.pt        where public training and warm-up stand, until they are done
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dither.errors import LabelError, OutputPathError, RunFolderError
from dither.files import make_folder, replacing, sync_folder

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = "dither run 1"


@dataclass(frozen=True)
class Images:
    """What the model generates. Public facts of the data set.

    Args:
        dataset: name of the data set.
        input_size: side in pixels.
        in_channels: colour channels.
        num_classes: labels run from 0 to `num_classes - 1`.
        class_names: one for each label; empty if they have none but their numbers.
        latents: where latents come from, as `dither.data.Latents` has it; None for images.
    """

    dataset: str
    input_size: int
    in_channels: int
    num_classes: int
    class_names: tuple[str, ...] = ()
    latents: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "class_names", tuple(self.class_names))  # JSON has lists

    def label(self, word: str) -> int:
        """The label that a word names: a class's name, else its number.

        Raises:
            LabelError: neither.
        """
        if word in self.class_names:
            return self.class_names.index(word)
        try:
            number = int(word)
        except ValueError:
            raise LabelError(
                f"there is no class {word!r}", fix=f"the run's classes: {', '.join(self.class_names) or 'numbers only'}"
            ) from None
        if not 0 <= number < self.num_classes:
            raise LabelError(
                f"label {number} is outside 0..{self.num_classes - 1}", fix="choose a class that the run was trained on"
            )
        return number


@dataclass(frozen=True)
class RunFolder:
    """A run folder and the facts in its run.json."""

    path: Path
    images: Images

    @property
    def config(self) -> Path:
        """Every option of the run."""
        return self.path / "config.yaml"

    @property
    def state(self) -> Path:
        """What a resume needs."""
        return self.path / "state"

    @property
    def has_state(self) -> bool:
        """Whether the private steps began, and a resume finds them."""
        from dither.checkpoint import is_complete

        return is_complete(self.state)

    @property
    def can_resume(self) -> bool:
        """Whether a resume finds anything, of the private steps or of what comes before them."""
        return self.has_state or self.beginning.exists()

    @property
    def tensorboard(self) -> Path:
        """The curves."""
        return self.path / "tensorboard"

    @property
    def samples(self) -> Path:
        """The labelled grid."""
        return self.path / "samples.png"

    def grid(self, step: int) -> Path:
        """The labelled grid drawn after this many steps."""
        return self.path / "samples" / f"step-{step:05}.png"

    @property
    def beginning(self) -> Path:
        """Where the training before the private steps stands."""
        return self.path / "beginning.pt"

    @property
    def class_statistics(self) -> Path:
        """The release that the model was first trained on."""
        return self.path / "class_statistics.safetensors"

    @property
    def certificate(self) -> Path:
        """The privacy claim."""
        return self.path / "certificate.json"

    @classmethod
    def create(cls, path: Path, images: Images) -> RunFolder:
        """Make a new run folder.

        Raises:
            OutputPathError: the path holds something already or cannot be written.
        """
        check_unused(path)
        try:
            make_folder(path)
            text = json.dumps({"format": FORMAT, "images": asdict(images)}, indent=2)
            with (path / "run.json").open("x") as file:  # of two processes at once, one makes the run
                file.write(text + "\n")
            sync_folder(path)
        except OSError as error:
            check_unused(path)  # by now another process may have begun a run there
            raise OutputPathError(
                f"{path} cannot be written: {error.strerror}", fix="give --output a path you may write"
            ) from error
        return cls(path, images)

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """Find a run again.

        Raises:
            RunFolderError: no folder there, not dither's, or damaged.
        """
        if not path.is_dir():
            raise RunFolderError(
                f"{path} is not a folder", fix="give the folder that `dither train` named when it began"
            )
        marker = path / "run.json"
        if not marker.is_file():
            raise RunFolderError(
                f"{path} has no run.json, so dither did not write it", fix="give a run folder of `dither train`"
            )
        try:
            content = json.loads(marker.read_text())
            if content["format"] != FORMAT:
                raise RunFolderError(
                    f"{marker} says format {content['format']!r}; this dither reads {FORMAT!r}",
                    fix="use the dither version that wrote the run",
                )
            return cls(path, Images(**content["images"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunFolderError(
                f"{marker} is damaged: {error}", fix="restore it from a copy, or train again"
            ) from error

    def discard(self) -> None:
        """Take a folder back that `create` just made."""
        for name in ("run.json", "model.json", "public.json", "beginning.pt", "config.yaml"):
            (self.path / name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.path.rmdir()

    def save_weights(self, name: str, weights: Mapping[str, Tensor]) -> None:
        """Write weights to `<name>.safetensors`; a crash leaves those of before."""
        from safetensors.torch import save_file

        tensors = {key: value.detach().cpu().contiguous().clone() for key, value in weights.items()}
        with replacing(self.path / f"{name}.safetensors") as partial:
            save_file(tensors, str(partial))

    def load_weights(self, name: str) -> dict[str, Tensor]:
        """Read weights from `<name>.safetensors`.

        Raises:
            RunFolderError: missing or damaged.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        file = self.path / f"{name}.safetensors"
        if not file.is_file():
            raise RunFolderError(
                f"{file} is missing: the run has not finished or was damaged",
                fix=f"finish it: dither train --resume {self.path}",
            )
        try:
            return dict(load_file(str(file)))
        except (SafetensorError, OSError) as error:
            raise RunFolderError(
                f"{file} is damaged: {error}", fix=f"write it again: dither train --resume {self.path}"
            ) from error

    def save_certificate(self, certificate: Mapping[str, Any]) -> None:
        """Write certificate.json; a crash leaves that of before."""
        with replacing(self.certificate) as partial:
            partial.write_text(json.dumps(certificate, indent=2) + "\n")


def check_unused(path: Path) -> None:
    """Refuse, before any work, a run folder that holds something already.

    Raises:
        OutputPathError: it does, or is a file.
    """
    if path.exists() and not path.is_dir():
        raise OutputPathError(f"{path} is a file, not a folder", fix="give --output another path")
    if path.is_dir() and any(path.iterdir()):
        raise OutputPathError(
            f"{path} is not empty, and dither overwrites no run",
            fix=f"give --output another path, or continue that run: dither train --resume {path}",
        )


def check_writable(file: Path) -> None:
    """Refuse, before any work, a file that could not be written after it.

    Raises:
        OutputPathError: its folder does not exist or cannot be written, or the path is a folder.
    """
    if file.is_dir():
        raise OutputPathError(f"{file} is a folder", fix="give a file name, e.g. samples.png")
    try:
        descriptor, probe = tempfile.mkstemp(dir=file.parent)
    except OSError as error:
        raise OutputPathError(f"{file} cannot be written: {error.strerror}", fix="give a path you may write") from error
    os.close(descriptor)
    os.unlink(probe)
