"""`dither sample`: images of chosen classes from a trained run, as a labelled grid."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from jsonargparse import ActionConfigFile, ArgumentParser
from rich.console import Console

from dither.cli.parsing import Formatter, parse
from dither.cli.reading import read_run_recipe
from dither.cli.results import load
from dither.cli.run_folder import RunFolder, check_writable
from dither.errors import ConfigurationError, LabelError

if TYPE_CHECKING:
    from torch import Tensor

EXAMPLES = """
examples:
  dither sample runs/digits-20250101-120000                        ten images of every class, in samples.png here
  dither sample runs/strict --label 3 --count 16 --guidance 2      sixteen threes, clearer and less varied
  dither sample runs/strict --label 1 7 --sampler dpm-solver++ --steps 20
  dither sample runs/strict --count 150 --npz generated.npz        arrays to train a classifier on

Sampling is post-processing of weights that are private already: it spends nothing, however much you draw.
"""


def sample_parser() -> ArgumentParser:
    """The parser of `dither sample`."""
    parser = ArgumentParser(
        prog="dither sample",
        usage="dither sample RUN [options]",
        description="Draw images from a trained run.",
        epilog=EXAMPLES,
        formatter_class=Formatter,
        exit_on_error=False,
    )
    parser.add_argument("run", type=Path, help="the folder that `dither train` wrote")
    parser.add_argument("--config", action=ActionConfigFile, help="a YAML file of these options; words after it win")
    parser.add_argument("--label", type=int, nargs="+", default=None, help="the classes; by default every one")
    parser.add_argument("--count", type=int, default=10, help="images of each class")
    parser.add_argument("--output", type=Path, default=Path("samples.png"), help="the grid, a PNG")
    parser.add_argument("--npz", type=Path | None, default=None, help="also write arrays: images in [-1, 1], labels")
    parser.add_argument(
        "--guidance",
        type=float | None,
        default=None,
        help="strength of classifier-free guidance; 1 is off; by default the run's",
    )
    parser.add_argument(
        "--sampler",
        type=Literal["ddim", "ddpm", "dpm-solver++", "euler"] | None,
        default=None,
        help="by default the run's",
    )
    parser.add_argument("--steps", type=int | None, default=None, help="denoising steps; by default the run's")
    parser.add_argument("--weights", type=Literal["ema", "raw"], default="ema", help="which weights to draw from")
    parser.add_argument("--seed", type=int | None, default=None, help="the same images again")
    return parser


def run(words: Sequence[str]) -> int:
    """Run `dither sample`; returns the exit code."""
    options = parse(sample_parser(), words)
    folder = RunFolder.open(options.run)
    labels = _labels(options.label, options.count, folder.images.num_classes)
    for file in filter(None, (options.output, options.npz)):
        check_writable(file)
    recipe = read_run_recipe(folder.config)
    weights = folder.load_weights("ema" if options.weights == "ema" else "model")

    from dither.diffusion.grid import save_grid
    from dither.diffusion.recipe import build_model, build_process
    from dither.diffusion.sampling import sample

    images = folder.images
    model = build_model(recipe, images.input_size, images.in_channels, images.num_classes)
    load(model, weights)
    drawn = sample(
        model,
        labels,
        process=build_process(recipe),
        sampler=options.sampler or recipe.sampler,
        steps=recipe.sampler_steps if options.steps is None else options.steps,
        guidance=recipe.guidance if options.guidance is None else options.guidance,
        seed=options.seed,
    )
    save_grid(drawn, labels, options.output)
    console = Console()
    console.print(f"{len(drawn)} images in {options.output}", highlight=False, soft_wrap=True)
    if options.npz is not None:
        _save_arrays(options.npz, drawn, labels)
        console.print(f"arrays in {options.npz}", highlight=False, soft_wrap=True)
    return 0


def _labels(chosen: list[int] | None, count: int, num_classes: int) -> Tensor:
    """Each chosen class `count` times."""
    import torch

    if count < 1:
        raise ConfigurationError(f"--count {count} is below 1", fix="ask for at least one image")
    for label in chosen or ():
        if not 0 <= label < num_classes:
            raise LabelError(
                f"label {label} is outside 0..{num_classes - 1}", fix="choose a class that the run was trained on"
            )
    return torch.tensor(chosen if chosen is not None else range(num_classes)).repeat_interleave(count)


def _save_arrays(path: Path, images: Tensor, labels: Tensor) -> None:
    import numpy

    with path.open("wb") as file:  # a file object keeps numpy from appending .npz to the name
        numpy.savez_compressed(file, images=images.cpu().numpy(), labels=labels.cpu().numpy())
