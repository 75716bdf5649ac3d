"""`--pretrain.path`: a second data set, taken as public, read as `--data.path` reads the private one."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from torch import Tensor, nn

from dither.cli.data import read_data
from dither.cli.options import Data, Options, Pretraining
from dither.cli.public import ON_WHOSE_WORD, PUBLIC, files_digest, read_facts
from dither.cli.run_folder import Images, RunFolder
from dither.diffusion.finetuning import all_but_updates
from dither.diffusion.ordinary_training import OrdinaryTraining
from dither.diffusion.recipe import build_loss
from dither.errors import ConfigurationError, DataError, RunFolderError

if TYPE_CHECKING:
    from dither.data import ImageData


@dataclass(frozen=True)
class Unlabelled:
    """Images whose labels are all 0, as a model that is told none needs them."""

    images: ImageData

    def __len__(self) -> int:
        """Number of images."""
        return len(self.images)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Images (b, C, H, W) and zeros (b,) at indices (b,)."""
        images, labels = self.images.batch(indices)
        return images, torch.zeros_like(labels)


def read_public(options: Options, images: Images, console: Console) -> ImageData | None:
    """Read the public data set, brought to the private one's side and channels; None if there is none.

    Raises:
        ConfigurationError: its images or labels do not go with the private ones.
        DataError: it cannot be read.
    """
    chosen = options.pretrain
    if chosen.path is None:
        return None
    if not chosen.labels and options.recipe.label_dropout == 0:
        raise ConfigurationError(
            "public labels are hidden, and a model without label dropout has no 'no label'",
            fix="--recipe.label_dropout 0.1, or --pretrain.labels true for the same classes",
        )
    try:
        data = read_data(_as_private(options.data, chosen, images), console)
    except (DataError, ConfigurationError) as error:
        fix = error.fix.replace("--data.", "--pretrain.")
        raise type(error)(f"--pretrain.path: {error.what.replace('--data.', '--pretrain.')}", fix=fix) from error
    _check(data, chosen, images)
    return data


def public_facts(data: ImageData, chosen: Pretraining) -> dict[str, Any]:
    """What the certificate says of a public data set and what was done with it."""
    assert chosen.path is not None
    path = Path(chosen.path)
    return {
        "path": chosen.path,
        "sha256": files_digest(path) if path.exists() else None,
        "taken_as_public": ON_WHOSE_WORD,
        "examples": len(data),
        "labels": chosen.labels,
        "steps": chosen.steps,
        "learning_rate": chosen.learning_rate,
        "batch_size": chosen.batch_size,
    }


def check_unchanged(folder: RunFolder, data: ImageData, chosen: Pretraining) -> None:
    """Refuse to go on in public data other than those that the certificate will name.

    Args:
        folder: of the run, whose `public.json` says what it began with.
        data: as read now.
        chosen: of the run.

    Raises:
        RunFolderError: other files, or another number of images where there are no files.
    """
    old, new = read_facts(folder, PUBLIC).get("pretraining", {}), public_facts(data, chosen)
    for fact, name in (("sha256", "SHA-256"), ("examples", "number of images")):
        if old.get(fact) != new[fact]:
            raise RunFolderError(
                f"the public data set at {chosen.path} is not the one that the run began with: its {name} was "
                f"{old.get(fact)} and is {new[fact]}",
                fix="put the files back as they were, or start a new run",
            )


def public_training(options: Options, model: nn.Module, data: ImageData) -> OrdinaryTraining:
    """The public steps: of all parameters but fixed positions and low-rank updates, whatever the private ones train."""
    chosen, recipe = options.pretrain, options.recipe
    return OrdinaryTraining(
        model,
        all_but_updates(model, options.finetune.mode),
        data if chosen.labels else Unlabelled(data),
        build_loss(recipe if chosen.labels else replace(recipe, label_dropout=1.0), data.num_classes),
        steps=chosen.steps,
        learning_rate=chosen.learning_rate,
        batch_size=chosen.batch_size,
    )


def _as_private(private: Data, chosen: Pretraining, images: Images) -> Data:
    own = {name: getattr(chosen, name) for name in asdict(Data()) if hasattr(chosen, name)}
    if images.latents is not None:
        return Data(**own)  # their size is checked below
    if str(chosen.path).endswith(".safetensors"):
        raise ConfigurationError(
            f"{chosen.path} holds latents, and the private data are images", fix="give images, or encode both"
        )
    return replace(private, **own, image_size=images.input_size, channels=1 if images.in_channels == 1 else 3)


def _check(data: ImageData, chosen: Pretraining, images: Images) -> None:
    latents = None if data.latents is None else asdict(data.latents)
    if latents != images.latents:
        raise ConfigurationError(
            f"--pretrain.path: latents of {latents}, and the private ones of {images.latents}",
            fix="encode both data sets with one autoencoder: dither encode",
        )
    shape, private = (data.channels, data.image_size), (images.in_channels, images.input_size)
    if shape != private:
        raise ConfigurationError(
            f"--pretrain.path: {shape[0]} channels of side {shape[1]}, the private data {private[0]} of {private[1]}",
            fix="encode both data sets at one image size",
        )
    if chosen.labels and data.class_names != images.class_names:
        raise ConfigurationError(
            f"--pretrain.path has the classes {', '.join(data.class_names)}; the private data "
            f"{', '.join(images.class_names)}",
            fix="--pretrain.labels false hides the public labels; --pretrain.class_names names classes anew",
        )
