"""The warm-up of `dither train`: noisy class means are released, and the model is first trained on them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console

from dither.cli.options import Options
from dither.cli.run_folder import RunFolder

if TYPE_CHECKING:
    from torch import nn

    from dither.accounting import Event
    from dither.data import ImageData
    from dither.diffusion.loss import DiffusionLoss


def check_warm_up(options: Options, examples: int) -> None:
    """Refuse, before anything is released, a warm-up after which no noise would meet the budget.

    Args:
        options: of the run.
        examples: in the data set.

    Raises:
        BudgetError: the release alone spends epsilon.
        ConfigurationError: one of its options cannot work.
    """
    from dither.accounting import noise_multiplier_for

    privacy = options.privacy
    if options.warm_up.draws and privacy.epsilon is not None:
        rate = min(1.0, privacy.expected_batch_size / examples)
        noise_multiplier_for(privacy.epsilon, privacy.delta, rate, privacy.steps, _events(options))


def _events(options: Options) -> tuple[Event, ...]:
    from dither.accounting import CLASS_MEANS, Event, Ledger

    chosen = options.warm_up
    return Ledger([Event(chosen.sample_rate, chosen.noise_multiplier, chosen.draws, CLASS_MEANS)]).events


def warm_up(
    options: Options, folder: RunFolder, data: ImageData, model: nn.Module, loss: DiffusionLoss, console: Console
) -> tuple[Event, ...]:
    """Release noisy class means into the run folder, once, and train the model on them.

    Guarantee: the release is `dither.class_means.release_class_means`'s; training on it is post-processing.

    Args:
        options: of the run; `warm_up.draws` 0 does nothing.
        folder: of the run; it holds no release yet.
        data: the private images.
        model: changed in place.
        loss: as in the private training.
        console: says what is done.

    Returns:
        What was released, for the run's ledger.
    """
    from dither.class_means import release_class_means
    from dither.diffusion.grid import save_grid
    from dither.diffusion.pretraining import pretrain

    chosen = options.warm_up
    if not chosen.draws:
        return ()
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
    pretrain(model, means.images, means.labels, loss, steps=chosen.steps, learning_rate=chosen.learning_rate)
    return means.events
