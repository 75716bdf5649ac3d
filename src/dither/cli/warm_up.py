"""The warm-up of `dither train`: statistics of each class are released once, and the model begins with them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console

from dither.cli.options import Options
from dither.cli.run_folder import RunFolder
from dither.errors import ConfigurationError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from dither.accounting import Event
    from dither.data import ImageData
    from dither.diffusion.ordinary_training import LabelledImages, OrdinaryTraining
    from dither.release import ClassGaussians, ClassMeans, ClassMixtures

    Released = ClassMeans | ClassGaussians | ClassMixtures

_PIXELS = (-1.0, 1.0)
_SHOWN = 10  # drawn images of each class in the picture of a release


def planned_release(options: Options) -> tuple[Event, ...]:
    """What the warm-up will cost, for a ledger; nothing without one.

    Raises:
        BudgetError: no noise meets its share of epsilon.
        ConfigurationError: a sample rate, share or noise multiplier that cannot be, or none of the last two to go by.
    """
    from dither.accounting import CLASS_GAUSSIANS, CLASS_MEANS, CLASS_MIXTURES, Event, Ledger, noise_multiplier_for

    chosen, privacy = options.warm_up, options.privacy
    if chosen.kind == "none":
        return ()
    rate, count, name = chosen.sample_rate, chosen.draws, CLASS_MEANS
    if chosen.kind == "gaussians":
        rate, count, name = 1.0, 3, CLASS_GAUSSIANS
    if chosen.kind == "mixtures":
        rate, count, name = 1.0, 1, CLASS_MIXTURES
    noise = chosen.noise_multiplier
    if noise is None:
        if privacy.epsilon is None:
            raise ConfigurationError(
                "--privacy.noise_multiplier sets no epsilon that the warm-up could have a share of",
                fix="give --warm_up.noise_multiplier too, or --privacy.epsilon",
            )
        if not 0 < chosen.share < 1:
            raise ConfigurationError(f"--warm_up.share {chosen.share} is not between 0 and 1", fix="0.5")
        noise = noise_multiplier_for(chosen.share * privacy.epsilon, privacy.delta, rate, count)
    return Ledger([Event(rate, noise, count, name)]).events


def release(options: Options, folder: RunFolder, data: ImageData, console: Console) -> Released:
    """Release the statistics into the run folder, or read them where that was done before.

    Guarantee: that of `release_class_means`, `release_class_gaussians` or `release_class_mixtures`, each in the module
    of its name; a folder holds one release, and a resume takes it.

    Args:
        options: of the run, with a warm-up.
        folder: of the run.
        data: the private images.
        console: says what is done.
    """
    from dither.diffusion.grid import save_grid
    from dither.release import (
        ClassGaussians,
        ClassMeans,
        ClassMixtures,
        release_class_gaussians,
        release_class_means,
        release_class_mixtures,
        usual_clip_norm,
    )

    chosen, images, file = options.warm_up, folder.images, folder.class_statistics
    entries = images.in_channels * images.input_size**2
    kinds: dict[str, type[Released]] = {"means": ClassMeans, "gaussians": ClassGaussians, "mixtures": ClassMixtures}
    if file.exists():
        return kinds[chosen.kind].load(file)
    (event,) = planned_release(options)
    common: dict[str, Any] = {
        "num_classes": images.num_classes,
        "noise_multiplier": event.noise_multiplier,
        "centre": chosen.centre,
        "clip_norm": usual_clip_norm(entries) if chosen.clip_norm is None else chosen.clip_norm,
        "seed": options.seed,
    }
    found: Released
    labels = torch.arange(images.num_classes).repeat(_SHOWN)
    if chosen.kind == "mixtures":
        found = release_class_mixtures(data, rank=chosen.rank, components=chosen.components, **common)
        shown, said = found.draw(labels, _PIXELS), "mixture of Gaussians"
    elif chosen.kind == "gaussians":
        found = release_class_gaussians(data, rank=min(chosen.rank, entries), **common)
        shown, said = found.draw(labels, _PIXELS), "Gaussian"
    else:
        limits = None if images.latents is not None else _PIXELS
        found = release_class_means(
            data, draws=chosen.draws, sample_rate=event.sampling_probability, limits=limits, **common
        )
        shown, labels, said = found.images, found.labels, "mean"
    found.save(file)
    if images.latents is None:
        save_grid(shown, labels, file.with_suffix(".png"), images.class_names)
    console.print(f"Warm-up: a noisy {said} of each class is released, at noise {event.noise_multiplier:.3g}.")
    return found


def warm_up_training(
    options: Options, folder: RunFolder, model: nn.Module, released: ClassMeans | ClassGaussians
) -> OrdinaryTraining:
    """The steps on what was released: of the parameters that the private steps train."""
    from dither.diffusion.ordinary_training import OrdinaryTraining
    from dither.diffusion.recipe import build_loss
    from dither.release import ClassMeans

    images, chosen = folder.images, options.warm_up
    limits = None if images.latents is not None else _PIXELS
    data: LabelledImages = _Means(released) if isinstance(released, ClassMeans) else _Drawn(released, limits)
    return OrdinaryTraining(
        model,
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        data,
        build_loss(options.recipe, images.num_classes),
        steps=chosen.steps,
        learning_rate=chosen.learning_rate,
    )


class _Means:
    """The means themselves, as labelled images."""

    def __init__(self, means: ClassMeans) -> None:
        self._means = means

    def __len__(self) -> int:
        return len(self._means.images)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        return self._means.images[indices], self._means.labels[indices]


class _Drawn:
    """An entry for each class; whoever reads it gets a fresh image of the class's Gaussian."""

    def __init__(self, gaussians: ClassGaussians, limits: tuple[float, float] | None) -> None:
        self._gaussians, self._limits = gaussians, limits

    def __len__(self) -> int:
        return len(self._gaussians.means)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        return self._gaussians.draw(indices, self._limits), indices
