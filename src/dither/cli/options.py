"""The options of `dither train`.

Privacy parameters change what is claimed; performance flags never do. They share no dataclass.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ActionConfigFile, ArgumentParser

from dither.cli.model_choice import ModelChoice
from dither.cli.parsing import Formatter
from dither.data.preparation import Preparation, Resize
from dither.diffusion.finetuning import FineTuning
from dither.diffusion.recipe import Recipe
from dither.diffusion.unet import UNet
from dither.telemetry.writers import Telemetry

EXAMPLES = """
examples:
  dither train                                          digits, epsilon 10, about three minutes on two cores
  dither train --epsilon 3 --output runs/strict         less spent, blurrier digits
  dither train --data.path photos --data.image_size 32  a folder of images, one subfolder per class
  dither train --data.path /usr/share/datasets/fashion-mnist
  dither train --steps 20                               a quick look that everything works
  dither train --noise_multiplier 2.0                   noise given, epsilon reported
  dither train --config runs/strict/config.yaml         the same options again; add --output to name the new run
  dither train --resume runs/strict                     go on where Ctrl-C or a crash ended it
  dither train --model diffusers_unet                   a U-Net of diffusers; or mymodels.Net, a class of yours
  dither train --data.path photos.safetensors --finetune.from dit.pt --finetune.mode lora --recipe.prediction epsilon
                                                        from a public DiT; or attention, biases, full
  dither train --pretrain.path public-photos            first, without noise, on images that are public
  dither train --performance.strategy ghost             another way to the same sums; the claim stays

With --data.path, settings that you do not give are chosen for your images and printed with the reason for each; the
defaults above are for the digits. docs/recipe.md says more.

--epsilon, --delta, --steps, --noise_multiplier, --max_grad_norm, --expected_batch_size, --microbatch_size, --threads
and --strategy are short for the options of the same name above. A run is a folder: weights, EMA, samples.png,
certificate.json, TensorBoard log, state.
"""

SHORT = {
    f"--{name}": f"--{group}.{name}"
    for group, names in {
        "privacy": ("epsilon", "delta", "steps", "noise_multiplier", "max_grad_norm", "expected_batch_size"),
        "performance": ("strategy", "microbatch_size", "threads"),
    }.items()
    for name in names
}


@dataclass(frozen=True)
class Privacy:
    """What the certificate will state. Fixed before the run; nothing here is derived from the data.

    Args:
        epsilon: the budget; the noise that meets it is computed. Give this or noise_multiplier.
        delta: probability with which the epsilon bound may fail; below 1 / number of examples, by a factor of ten
            where you can.
        noise_multiplier: standard deviation of the noise in units of max_grad_norm, instead of epsilon.
        max_grad_norm: each example's gradient is scaled down to this norm.
        expected_batch_size: each example joins a batch with probability expected_batch_size / number of examples.
        steps: noisy steps; each spends some of the budget.
        clipping: how a gradient is scaled to its bound; flat is the only way.
    """

    epsilon: float | None = 10.0
    delta: float = 1e-4
    noise_multiplier: float | None = None
    max_grad_norm: float = Recipe.max_grad_norm
    expected_batch_size: int = Recipe.expected_batch_size
    steps: int = Recipe.steps
    clipping: str = "flat"


@dataclass(frozen=True)
class Data:
    """What is trained on. Each image is prepared by itself and by these public choices; docs/data.md says more.

    Args:
        path: a folder with one subfolder per class, a folder with IDX files, an .npz, latents of `dither encode`
            (.safetensors), a Hugging Face dataset (saved folder, or hf:NAME, with @REVISION, :CONFIGURATION or both
            after it); by default the embedded digits.
        image_size: side in pixels; by default the images' own, which must be one size and square.
        channels: 1 (grey) or 3 (RGB); by default the images' own.
        resize: interpolation; none only cuts.
        crop: cut the centred square before resizing; false stretches what is not square.
        class_names: the label set, in the labels' order; by default what folders or files say.
        num_classes: size of the label set where nothing names the classes.
        skip_broken: leave images out that cannot be read, instead of refusing to begin.
        image_column: of a Hugging Face dataset; by default the only one with images.
        label_column: of a Hugging Face dataset; by default the only one with classes.
    """

    path: str | None = None
    image_size: int | None = None
    channels: Literal[1, 3] | None = None
    resize: Resize = Preparation.resize
    crop: bool = Preparation.crop
    class_names: list[str] | None = None
    num_classes: int | None = None
    skip_broken: bool = False
    image_column: str | None = None
    label_column: str | None = None


@dataclass(frozen=True)
class Pretraining:
    """Ordinary training on a public data set, before anything private. Never name the private one: nothing is noised.

    Args:
        path: a data set, as --data.path takes it; prepared like the private images, to their side and channels.
        steps: of Adam; the learning rate falls to zero over them.
        learning_rate: of the first step.
        batch_size: images of a step, drawn with replacement.
        labels: show the public labels, if they are of the private data's classes; by default they are hidden.
        class_names: as in --data, here of the public data.
        num_classes: likewise.
        skip_broken: likewise.
        image_column: likewise.
        label_column: likewise.
    """

    path: str | None = None
    steps: int = 1000
    learning_rate: float = 1e-3
    batch_size: int = 64
    labels: bool = False
    class_names: list[str] | None = None
    num_classes: int | None = None
    skip_broken: bool = False
    image_column: str | None = None
    label_column: str | None = None


@dataclass(frozen=True)
class WarmUp:
    """What of each class is released once with noise, paid from the same budget, for the model to begin with.

    Args:
        kind: mixtures (of Gaussians in each class, whose own denoiser the model then corrects, from zero), gaussians
            (means and covariances, of images of at most 4,096 entries), means, or none.
        share: of epsilon, that the release alone may cost. It costs the steps after it far less: noises add by squares.
        noise_multiplier: of the release, in place of a share.
        clip_norm: each image's distance from the centre is scaled down to this norm; a public guess; by default 0.6
            times the root of an image's entries.
        centre: value of an empty pixel; -1 for light on dark.
        rank: of mixtures and gaussians: directions that covariances are released along.
        components: of mixtures: Gaussians of a class.
        draws: of means: means of each class, of a sample each.
        sample_rate: of means: probability of an example to be in a draw.
        steps: of ordinary training on what was released; mixtures need none.
        learning_rate: of its first step.
    """

    kind: Literal["mixtures", "gaussians", "means", "none"] = "none"
    share: float = 0.5
    noise_multiplier: float | None = None
    clip_norm: float | None = None
    centre: float = -1.0
    rank: int = 30
    components: int = 1
    draws: int = 1
    sample_rate: float = 1.0
    steps: int = 300
    learning_rate: float = 1e-3


@dataclass(frozen=True)
class Performance:
    """How fast and with how much memory the same sums are formed. Nothing here changes the claim.

    Args:
        strategy: how norms and clipped sums are formed; auto chooses the cheapest for each use. The page on flash
            clipping explains the others.
        microbatch_size: examples in one forward and backward pass; auto fits memory and, on a CPU, is the
            fastest found.
        memory_budget: bytes that held per-example gradients may take, unless hold asks for them; by default half of
            what is free with auto, else no bound.
        threads: of torch; by default one per core.
    """

    strategy: Literal["auto", "hold", "ghost", "tile", "two_pass"] = "auto"
    microbatch_size: int | Literal["auto"] = "auto"
    memory_budget: float | None = None
    threads: int | None = None


@dataclass(frozen=True)
class Options:
    """Everything `dither train` was told."""

    data: Data
    privacy: Privacy
    performance: Performance
    recipe: Recipe
    warm_up: WarmUp
    telemetry: Telemetry
    model: Any
    """A name, or jsonargparse's Namespace of class_path and init_args."""
    unet: UNet
    finetune_from: Path | None
    finetune: FineTuning
    pretrain: Pretraining
    output: Path | None
    resume: Path | None
    seed: int | None
    save_every: float
    text: str
    """The options as config.yaml holds them: without output and resume."""
    given: frozenset[str]
    """Names of those that the user gave, in words or a file."""


def train_parser() -> ArgumentParser:
    """The parser of `dither train`."""
    parser = ArgumentParser(
        prog="dither train",
        usage="dither train [options]",
        description="Train a class-conditional diffusion model of images under differential privacy.",
        epilog=EXAMPLES,
        formatter_class=Formatter,
        exit_on_error=False,
        default_env=False,
    )
    parser.add_argument("--config", action=ActionConfigFile, help="a YAML file of these options; words after it win")
    parser.add_argument(
        "--output", type=Path | None, default=None, help="the new run folder; by default runs/<data>-<time>"
    )
    parser.add_argument(
        "--resume",
        type=Path | None,
        default=None,
        help="a run folder to continue; only --performance.*, --telemetry.* and --save_every may be given beside it",
    )
    parser.add_argument(
        "--seed",
        type=int | None,
        default=None,
        help="fixes all randomness, for tests: the certificate then says NOT PRIVATE",
    )
    parser.add_argument("--save_every", type=float, default=30.0, help="seconds between saves of the resumable state")
    parser.add_argument(
        "--model",
        type=ModelChoice,
        default="dit",
        help="dit, sized by --recipe; diffusers_unet, sized by --unet; or the path of a class with forward(x, t, y), "
        "arguments as --model.init_args.NAME",
    )
    parser.add_class_arguments(UNet, "unet")
    parser.add_class_arguments(Data, "data")
    parser.add_argument(
        "--finetune.from",
        type=Path | None,
        default=None,
        help="a public DiT to begin with: its .pt, a folder of diffusers, or a run; published ones want "
        "--recipe.prediction epsilon",
    )
    parser.add_class_arguments(FineTuning, "finetune")
    parser.add_class_arguments(Pretraining, "pretrain")
    parser.add_class_arguments(Privacy, "privacy")
    parser.add_class_arguments(WarmUp, "warm_up")
    parser.add_class_arguments(Performance, "performance")
    parser.add_class_arguments(Telemetry, "telemetry")
    # What the ledger knows is a privacy option, and has one place.
    parser.add_class_arguments(Recipe, "recipe", skip={"steps", "expected_batch_size", "max_grad_norm"})
    return parser
