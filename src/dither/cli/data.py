"""The data set that a command's options name, and what a run needs to know of it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import Progress

from dither.cli.options import Data
from dither.cli.run_folder import Images
from dither.diffusion.recipe import Recipe
from dither.errors import ConfigurationError, RunFolderError

if TYPE_CHECKING:
    from torch import Tensor

    from dither.data import ImageData
    from dither.data.sources import Split

_SHOWN = 20


def read_data(options: Data, console: Console | None = None, split: Split = "train") -> ImageData:
    """Read the data set, with a bar while image files are checked, and say what was left out.

    Args:
        options: as the command or a run's config.yaml has them.
        console: where to show it; nowhere if None.
        split: "train" or "held-out".

    Raises:
        DataError: it cannot be read.
    """
    from dither.data import read_images

    if console is None:
        return read_images(**asdict(options), split=split)
    with Progress(console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task("checking images", total=None)
        data = read_images(
            **asdict(options),
            split=split,
            progress=lambda done, count: bar.update(task, completed=done, total=count),
        )
    if data.left_out:
        more = f"\n  and {len(data.left_out) - _SHOWN} more" if len(data.left_out) > _SHOWN else ""
        lines = "\n  ".join(data.left_out[:_SHOWN])
        console.print(
            f"Left out {len(data.left_out)} (not private):\n  {lines}{more}",
            soft_wrap=True,
        )
    return data


def check_there(options: Data, config: Path) -> None:
    """Refuse to go on with a run whose data set was moved away, and say where its new place belongs.

    Args:
        options: the run's.
        config: its config.yaml.

    Raises:
        RunFolderError: nothing is where the run's data set was.
    """
    from dither.data.reading import HUB

    if options.path is not None and not options.path.startswith(HUB) and not Path(options.path).exists():
        raise RunFolderError(
            f"the run's data set is no longer at {options.path}",
            fix=f"put it back, or write where it is now as data.path into {config}",
        )


def images_of(data: ImageData) -> Images:
    """The public facts that run.json holds."""
    return Images(
        dataset=data.name,
        input_size=data.image_size,
        in_channels=data.channels,
        num_classes=data.num_classes,
        class_names=data.class_names,
        latents=None if data.latents is None else asdict(data.latents),
    )


def check_same(images: Images, data: ImageData) -> None:
    """Refuse to go on with a data set of other size, channels or classes than the run's.

    Raises:
        RunFolderError: it is another.
    """
    found = images_of(data)
    for fact in ("input_size", "in_channels", "num_classes", "class_names"):
        old, new = getattr(images, fact), getattr(found, fact)
        if old and old != new:  # runs before there were class names have none
            raise RunFolderError(
                f"the data set is another than the run's: {fact} was {old} and is {new}",
                fix="put the run's data set back where its config.yaml says, or start a new run",
            )


def pictures(drawn: Tensor, images: Images) -> Tensor:
    """What a model drew, as images: latents are decoded where their autoencoder is still in its folder.

    Args:
        drawn: (N, C, H, W).
        images: of the run.

    Returns:
        Images (N, C, H, W) in [-1, 1], or the latents themselves.
    """
    from dither.data.autoencoder import Autoencoder

    if images.latents is None or stays_latent(images):
        return drawn
    return Autoencoder(Path(images.latents["vae"])).decode(drawn.cpu())


def stays_latent(images: Images) -> bool:
    """Whether the run draws latents whose autoencoder is not where it was."""
    return images.latents is not None and not Path(images.latents["vae"]).is_dir()


def fit_patches(recipe: Recipe, images: Images, console: Console) -> dict[str, int]:
    """What of the recipe to change so that patches tile the images: the largest smaller size that does, or nothing.

    Raises:
        ConfigurationError: the user's patch size does not divide the side, or no size from 2 to the model's does.
    """
    from dither.diffusion.dit import preset

    side, own = images.input_size, preset(recipe.model).get("patch_size")
    patch = own if recipe.patch_size is None else recipe.patch_size
    if patch is None or side % patch == 0:  # without a patch, no such model: building it says so
        return {}
    fitting = [size for size in range(2, patch) if side % size == 0]
    if recipe.patch_size is not None or not fitting:
        choices = ", ".join(map(str, fitting)) or f"no patch size above 1 and below {patch} does"
        raise ConfigurationError(
            f"--recipe.patch_size {patch} does not divide the images' side of {side} pixels",
            fix=f"choose a divisor ({choices}), or another side: --data.image_size 32",
        )
    console.print(
        f"Patches of {fitting[-1]} x {fitting[-1]} pixels: {patch} does not divide {side}. Another choice: "
        "--recipe.patch_size",
        soft_wrap=True,
    )
    return {"patch_size": fitting[-1]}
