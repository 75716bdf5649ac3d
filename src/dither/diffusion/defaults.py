"""Settings chosen from what is public of a data set: how many images, of what shape.

Nothing here looks at an image. The numbers were found on Fashion-MNIST's training images (28 x 28) at epsilon 10.
"""

from __future__ import annotations

import math
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

from dither.diffusion.recipe import Recipe

_LARGEST_BATCH = 4096
_PASSES, _FEWEST_STEPS = 20, 150
_ONE_TOKEN = 1024  # entries of an image, up to which one token holds it
_GAUSSIANS = 4096  # entries, up to which second moments are released
_FEWEST_OF_A_CLASS = 100
_MODEL = {f"recipe.{name}" for name in ("model", "patch_size", "hidden_size", "depth", "num_heads", "prediction")}


@dataclass(frozen=True)
class Choice:
    """One setting.

    Attributes:
        group: of the command's options: "privacy", "recipe" or "warm_up".
        name: within the group.
        value: of the option.
        reason: in words, for whoever wants another.
    """

    group: str
    name: str
    value: Any
    reason: str


def choose(
    examples: int,
    num_classes: int,
    side: int,
    channels: int,
    latents: bool,
    *,
    epsilon: float | None = 10.0,
    batch: float | None = None,
    given: AbstractSet[str] = frozenset(),
    of_recipe: bool = True,
) -> list[Choice]:
    """Settings for a data set other than the demo's digits.

    The settings of a model go together, and so do those of a warm-up: where the user gave the model's name, one of its
    settings or the kind of warm-up, the rest of these stay as they are.

    Args:
        examples: number of images; taken as public, as the accounting takes it.
        num_classes: size of the public label set.
        side: of an image, in pixels or latent cells.
        channels: of an image.
        latents: whether the images are an autoencoder's latents.
        epsilon: of the run; None where its noise is given, and a warm-up could have no share of it.
        batch: the user's expected batch size; None chooses one.
        given: "group.name" of what the user gave, which is not chosen.
        of_recipe: whether the model is the recipe's own; for another only delta is chosen, and the batch where the
            recipe's is more than half of the images.
    """
    if of_recipe:
        chosen = _for_the_recipe(examples, num_classes, side, channels, latents, epsilon, batch, given)
    else:
        chosen = [_delta(examples)]
        if Recipe.expected_batch_size > _half(examples):
            chosen.append(_batch(_half(examples)))
    return [one for one in chosen if f"{one.group}.{one.name}" not in given]


def _delta(examples: int) -> Choice:
    below = 10.0 ** -(math.floor(math.log10(examples)) + 1)
    return Choice("privacy", "delta", below, f"below 1 / {examples:,} images")


def _batch(size: float) -> Choice:
    return Choice("privacy", "expected_batch_size", size, "a step's noise is shared by its batch")


def _half(examples: int) -> int:
    return max(1, examples // 2)


def _for_the_recipe(
    examples: int,
    num_classes: int,
    side: int,
    channels: int,
    latents: bool,
    epsilon: float | None,
    batch: float | None,
    given: AbstractSet[str],
) -> list[Choice]:
    """Every setting that goes with the recipe's own model, given or not; a group that the user began is left out."""
    entries = channels * side**2
    batch = min(_LARGEST_BATCH, _half(examples)) if batch is None else batch
    steps = max(_FEWEST_STEPS, round(_PASSES * examples / batch))
    chosen = [
        _delta(examples),
        _batch(batch),
        Choice("privacy", "steps", steps, f"about {steps * batch / examples:.0f} passes over the images"),
        Choice("recipe", "multiplicity", 4, "noise draws of an image within its one clipped gradient"),
        Choice("recipe", "learning_rate", 3e-3, "right for large batches"),
    ]
    if entries <= _ONE_TOKEN and not latents and _MODEL.isdisjoint(given):
        whole = "one token an image: the noise spoils few weights, and a step is short"
        narrow = "a token narrower than its patch cannot pass noise through, so the image is predicted"
        chosen += [
            Choice("recipe", "patch_size", side, whole),
            Choice("recipe", "hidden_size", 128, "two blocks of this width"),
            Choice("recipe", "prediction", "sample", narrow),
        ]
    enough = examples >= _FEWEST_OF_A_CLASS * num_classes
    if entries <= _GAUSSIANS and not latents and enough and epsilon is not None and "warm_up.kind" not in given:
        dark = (
            "the empty pixel of grey images is taken as dark" if channels == 1 else "colours are taken about mid-grey"
        )
        chosen += [
            Choice("warm_up", "kind", "gaussians", "a noisy Gaussian of each class is cheap at this many images"),
            Choice("warm_up", "centre", -1.0 if channels == 1 else 0.0, dark),
            Choice("warm_up", "steps", 800, "on images drawn from these, which cost nothing more"),
            Choice("warm_up", "learning_rate", 2e-3, "of its first step"),
        ]
    return chosen
