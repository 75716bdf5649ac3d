"""The warm-up of `dither train`: noisy class means are released, and the model is first trained on them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console

from dither.cli.options import Options
from dither.cli.run_folder import RunFolder

if TYPE_CHECKING:
    from torch import nn

    from dither.accounting import Event
    from dither.class_means import ClassMeans
    from dither.data import ImageData
    from dither.diffusion.ordinary_training import OrdinaryTraining


def planned_release(options: Options) -> tuple[Event, ...]:
    """What the warm-up will cost, for a ledger; nothing without one.

    Raises:
        ConfigurationError: a sample rate or noise multiplier that cannot be.
    """
    from dither.accounting import CLASS_MEANS, Event, Ledger

    chosen = options.warm_up
    if not chosen.draws:
        return ()
    return Ledger([Event(chosen.sample_rate, chosen.noise_multiplier, chosen.draws, CLASS_MEANS)]).events


def release_means(options: Options, folder: RunFolder, data: ImageData, console: Console) -> ClassMeans:
    """Release noisy class means into the run folder, or read them where that was done before.

    Guarantee: that of `dither.class_means.release_class_means`; a folder holds one release, and a resume takes it.

    Args:
        options: of the run; `warm_up.draws` is above 0.
        folder: of the run.
        data: the private images.
        console: says what is done.
    """
    from dither.class_means import ClassMeans, release_class_means
    from dither.diffusion.grid import save_grid

    if folder.class_means.exists():
        return ClassMeans.load(folder.class_means)
    chosen = options.warm_up
    means = release_class_means(
        data,
        num_classes=folder.images.num_classes,
        noise_multiplier=chosen.noise_multiplier,
        clip_norm=chosen.clip_norm,
        draws=chosen.draws,
        sample_rate=chosen.sample_rate,
        centre=chosen.centre,
        limits=(-1.0, 1.0) if folder.images.latents is None else None,
        seed=options.seed,
    )
    means.save(folder.class_means)
    if folder.images.latents is None:
        save_grid(means.images, means.labels, folder.class_means.with_suffix(".png"))
    console.print(f"Warm-up: {len(means.images)} noisy class means, paid from the budget.", highlight=False)
    return means


def warm_up_training(options: Options, folder: RunFolder, model: nn.Module, means: ClassMeans) -> OrdinaryTraining:
    """The steps on the released means: of the parameters that the private steps train."""
    from dither.data.image_data import Held, ImageData
    from dither.diffusion.ordinary_training import OrdinaryTraining
    from dither.diffusion.recipe import build_loss

    images, chosen = folder.images, options.warm_up
    data = ImageData(
        Held(means.images),
        means.labels,
        name="class means",
        class_names=images.class_names,
        image_size=images.input_size,
        channels=images.in_channels,
    )
    return OrdinaryTraining(
        model,
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        data,
        build_loss(options.recipe, images.num_classes),
        steps=chosen.steps,
        learning_rate=chosen.learning_rate,
    )
