"""Settings chosen from what is public of a data set: how many images, of what shape.

Nothing here looks at an image. The numbers were found on Fashion-MNIST's training images (28 x 28) at epsilon 10: for a
small U-Net over a mixture of each class (the default), and for a DiT, whose checkpoints other programs read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dither.diffusion.dit import preset
from dither.diffusion.recipe import Recipe

_LARGEST_BATCH, _PASSES, _FEWEST_STEPS = 4096, 20, 150  # of a DiT
_U_NET_BATCH, _U_NET_PASSES = 512, 10  # twice that batch where the noise of a small epsilon wants it
_SMALL_EPSILON = 3.0
_ONE_TOKEN = 1024  # entries of an image, up to which one token holds it
_GAUSSIANS = 4096  # entries, up to which second moments are released
_FEWEST_OF_A_CLASS, _OF_A_COMPONENT, _MOST_COMPONENTS = 100, 300, 20
# Images of a class, times epsilon, that a mixture needs: its noise is shared by them. At 6,000 it holds (6,000 images,
# epsilon 1); at 144 (the digits, epsilon 1) it spoils the model.
_FOR_A_MIXTURE = 2000.0
_CELLS = 16  # about the side of what a U-Net sees of an image
_OF_A_DIT = {f"recipe.{name}" for name in ("model", "patch_size", "hidden_size", "depth", "num_heads")}


@dataclass(frozen=True)
class Choice:
    """One setting.

    Attributes:
        group: of the command's options: "privacy", "recipe", "unet" or "warm_up"; empty for the model's name.
        name: within the group.
        value: of the option.
        reason: in words, for whoever wants another.
    """

    group: str
    name: str
    value: Any
    reason: str

    @property
    def option(self) -> str:
        """Its full name."""
        return f"{self.group}.{self.name}" if self.group else self.name


@dataclass(frozen=True)
class _Data:
    """What is public of a data set."""

    examples: int
    num_classes: int
    side: int
    channels: int
    latents: bool

    @property
    def entries(self) -> int:
        return self.channels * self.side**2

    @property
    def half(self) -> int:
        return max(1, self.examples // 2)

    @property
    def of_a_class(self) -> float:
        return self.examples / self.num_classes


def choose(
    examples: int,
    num_classes: int,
    side: int,
    channels: int,
    latents: bool,
    *,
    epsilon: float | None = 10.0,
    batch: float | None = None,
    given: Mapping[str, Any] | None = None,
    public: bool = False,
) -> list[Choice]:
    """Settings for a data set other than the demo's digits.

    The settings of a model go together, and so do those of a warm-up. Where what the user gave goes with a U-Net over
    mixtures, the rest of that is chosen; otherwise the rest of what goes with a DiT, but nothing of a group that the
    user began; and for other models only what the number of images decides.

    Args:
        examples: number of images; taken as public, as the accounting takes it.
        num_classes: size of the public label set.
        side: of an image, in pixels or latent cells.
        channels: of an image.
        latents: whether the images are an autoencoder's latents.
        epsilon: of the run; None where its noise is given, and a warm-up could have no share of it.
        batch: the user's expected batch size; None chooses one.
        given: what the user gave, by "group.name": none of it is chosen.
        public: whether the run begins with a public model or public data.
    """
    data, given = _Data(examples, num_classes, side, channels, latents), given or {}
    over_mixtures = _u_net_over_mixtures(data, epsilon or math.inf, batch)
    fits = data.side % (2 * _patch(data)) == 0 and not latents
    enough = data.of_a_class * (epsilon or 0.0) >= _FOR_A_MIXTURE
    if fits and enough and not public and _agrees(given, over_mixtures):
        chosen = over_mixtures
    elif given.get("model", "dit") == "dit" and not given.get("finetune.from"):
        chosen = _dit(data, epsilon is not None, batch, given)
    else:
        chosen = [_delta(examples)]
        if Recipe.expected_batch_size > data.half:
            chosen.append(_batch(data.half))
    left = set(given)
    if given.get("recipe.guidance", 1) != 1:
        left.add("recipe.label_dropout")  # guidance needs some
    if "warm_up.noise_multiplier" in given:
        left.add("warm_up.share")
    return [one for one in chosen if one.option not in left]


def _agrees(given: Mapping[str, Any], chosen: Sequence[Choice]) -> bool:
    """Whether what the user gave leaves the model and the kind of warm-up that would be chosen."""
    fixed = {one.option: one.value for one in chosen if one.option in ("model", "warm_up.kind", "recipe.prediction")}
    return not any(name in given for name in _OF_A_DIT) and all(
        given[name] == value for name, value in fixed.items() if name in given
    )


def _delta(examples: int) -> Choice:
    below = 10.0 ** -(math.floor(math.log10(examples)) + 1)
    return Choice("privacy", "delta", below, f"below 1 / {examples:,} images")


def _batch(size: float) -> Choice:
    return Choice("privacy", "expected_batch_size", size, "a step's noise is shared by its batch")


def _passes(data: _Data, batch: float, passes: int) -> Choice:
    steps = max(_FEWEST_STEPS, round(passes * data.examples / batch))
    return Choice("privacy", "steps", steps, f"about {steps * batch / data.examples:.0f} passes over the images")


def _centre(data: _Data) -> Choice:
    dark = "the empty pixel of grey images is taken as dark"
    return (
        Choice("warm_up", "centre", -1.0, dark)
        if data.channels == 1
        else Choice("warm_up", "centre", 0.0, "colours are taken about mid-grey")
    )


def _patch(data: _Data) -> int:
    return max(1, round(data.side / _CELLS))


def _u_net_over_mixtures(data: _Data, epsilon: float, batch: float | None) -> list[Choice]:
    usual = _U_NET_BATCH if epsilon > _SMALL_EPSILON else 2 * _U_NET_BATCH
    batch = min(usual, data.half) if batch is None else batch
    components = int(min(_MOST_COMPONENTS, max(1, data.of_a_class // _OF_A_COMPONENT)))
    return [
        _delta(data.examples),
        _batch(batch),
        _passes(data, batch, _U_NET_PASSES),
        Choice("warm_up", "kind", "mixtures", "cheap at this many images; the model then corrects them"),
        Choice("warm_up", "components", components, f"of {_OF_A_COMPONENT} images or more"),
        Choice("warm_up", "rank", 60, "directions that hold most of an image"),
        Choice("warm_up", "share", 0.6, "of epsilon alone; the steps after it hardly notice"),
        _centre(data),
        Choice("", "model", "diffusers_unet", "small, for detail; --model dit for one that other programs read"),
        Choice("unet", "block_out_channels", (16, 32), "small: the noise spoils few weights"),
        Choice("unet", "attention", False, "the mixture knows the whole of an image"),
        Choice("unet", "patch_size", _patch(data), "a step is short"),
        Choice("recipe", "prediction", "edm", "zeros already denoise"),
        Choice("recipe", "sigma_data", 0.25, "what the mixture leaves is small"),
        Choice("recipe", "timestep_distribution", "log_normal", "middling noise, where there is most to learn"),
        Choice("recipe", "label_dropout", 0.0, "the mixture knows the label"),
        Choice("recipe", "multiplicity", 1, "more steps do more than more draws"),
        Choice("recipe", "learning_rate", 8e-3, "right for noisy gradients of this model"),
        Choice("recipe", "ema_decay", 0.97, "samples come from the average of about the last thirty steps"),
    ]  # fmt: skip


def _dit(data: _Data, budgeted: bool, batch: float | None, given: Mapping[str, Any]) -> list[Choice]:
    """Every setting that goes with the recipe's DiT, given or not; a group that the user began is left out."""
    batch = min(_LARGEST_BATCH, data.half) if batch is None else batch
    chosen = [
        _delta(data.examples),
        _batch(batch),
        _passes(data, batch, _PASSES),
        Choice("recipe", "multiplicity", 4, "noise draws of an image within its one clipped gradient"),
        Choice("recipe", "learning_rate", 3e-3, "right for large batches"),
    ]
    untouched = (_OF_A_DIT | {"recipe.prediction"}).isdisjoint(given)
    narrow = "a token narrower than its patch cannot pass noise through, so the image is predicted"
    if untouched and (data.latents or data.entries > _ONE_TOKEN):
        if data.channels * preset(Recipe.model)["patch_size"] ** 2 > preset(Recipe.model)["hidden_size"]:
            chosen.append(Choice("recipe", "prediction", "sample", narrow))
    elif untouched:
        whole = "one token an image: the noise spoils few weights, and a step is short"
        chosen += [
            Choice("recipe", "patch_size", data.side, whole),
            Choice("recipe", "hidden_size", 128, "two blocks of this width"),
            Choice("recipe", "prediction", "sample", narrow),
        ]
    small = data.entries <= _GAUSSIANS and not data.latents
    if small and data.of_a_class >= _FEWEST_OF_A_CLASS and budgeted and "warm_up.kind" not in given:
        chosen += [
            Choice("warm_up", "kind", "gaussians", "a noisy Gaussian of each class is cheap at this many images"),
            _centre(data),
            Choice("warm_up", "steps", 800, "on images drawn from these, which cost nothing more"),
            Choice("warm_up", "learning_rate", 2e-3, "of its first step"),
        ]
    return chosen
