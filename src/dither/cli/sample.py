"""`dither sample`: images of chosen classes from a trained run, as a labelled grid, a folder of PNGs or arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from jsonargparse import ActionConfigFile, ArgumentParser, Namespace
from rich.console import Console

from dither.cli.data import pictures, stays_latent
from dither.cli.drawing import draw
from dither.cli.outputs import check_new_file, check_new_folder, check_picture
from dither.cli.parsing import Formatter, parse
from dither.cli.run_folder import Images, RunFolder
from dither.errors import ConfigurationError

if TYPE_CHECKING:
    from torch import Tensor

    from dither.diffusion.edm import Churn

EXAMPLES = """
examples:
  dither sample runs/digits-20250101-120000                        ten images of every class, in samples.png here
  dither sample runs/strict --label 3 --count 16 --guidance 2      sixteen threes, clearer and less varied
  dither sample runs/fashion --label sneaker bag                   classes by their names
  dither sample runs/strict --label 1 7 --sampler dpm-solver++ --steps 20
  dither sample runs/strict --sampler edm --s_churn 10 --s_noise 1.003
  dither sample runs/strict --count 1000 --folder synthetic        a folder of PNGs for each class: a data set
  dither sample runs/strict --count 150 --npz generated.npz        arrays to train a classifier on

Sampling is post-processing of weights that are private already: it spends nothing, however much you draw. Every class
is drawn equally often, or as --label says: how often it occurs in the private data is private too.
"""

GRID = Path("samples.png")
GRID_PER_CLASS = 16


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
    parser.add_argument(
        "--label", type=str, nargs="+", default=None, help="the classes, by name or number; by default every one"
    )
    parser.add_argument("--count", type=int, default=10, help="images of each class")
    parser.add_argument(
        "--output",
        type=Path | None,
        default=None,
        help=f"a PNG with up to {GRID_PER_CLASS} of each class; by default {GRID}, unless --folder or --npz is given",
    )
    parser.add_argument("--folder", type=Path | None, default=None, help="write a PNG each, a subfolder for each class")
    parser.add_argument("--npz", type=Path | None, default=None, help="write arrays: images in [-1, 1], labels")
    parser.add_argument("--overwrite", action="store_true", help="replace files that are there already")
    parser.add_argument(
        "--guidance",
        type=float | None,
        default=None,
        help="strength of classifier-free guidance; 1 is off; by default the run's",
    )
    parser.add_argument(
        "--sampler",
        type=Literal["ddim", "ddpm", "dpm-solver++", "edm", "euler"] | None,
        default=None,
        help="by default the run's",
    )
    parser.add_argument("--steps", type=int | None, default=None, help="denoising steps; by default the run's")
    parser.add_argument("--s_churn", type=float | None, default=None, help="fresh noise of edm, in all; 0 is none")
    parser.add_argument("--s_min", type=float | None, default=None, help="lowest noise level that edm adds some at")
    parser.add_argument("--s_max", type=float | None, default=None, help="highest noise level that edm adds some at")
    parser.add_argument("--s_noise", type=float | None, default=None, help="deviation of edm's fresh noise; 1 is exact")
    parser.add_argument(
        "--vae",
        type=Path | None,
        default=None,
        help="folder of the autoencoder that decodes latents, if it is no longer where `dither encode` saw it",
    )
    parser.add_argument("--weights", type=Literal["ema", "raw"], default="ema", help="which weights to draw from")
    parser.add_argument("--seed", type=int | None, default=None, help="the same images again")
    parser.add_argument("--batch_size", type=int, default=256, help="images denoised together; changes no image")
    return parser


def run(words: Sequence[str]) -> int:
    """Run `dither sample`; returns the exit code."""
    options = parse(sample_parser(), words)
    from dither.diffusion.export import check_folder_names

    folder = _decoded_by(options.vae, RunFolder.open(options.run))
    labels = balanced_labels(options.label, options.count, folder.images)
    grid = GRID if options.output is options.folder is options.npz is None else options.output
    if options.npz is not None and options.npz.suffix != ".npz":
        raise ConfigurationError(
            f"--npz {options.npz} does not end in .npz, by which dither evaluate and train know such a file",
            fix=f"--npz {options.npz}.npz",
        )
    for file in filter(None, (grid, options.npz)):
        check_new_file(file, options.overwrite)
    if grid is not None:
        check_picture(grid)
    if options.folder is not None:
        check_new_folder(options.folder)
        check_folder_names(folder.images.class_names)
    console = Console(markup=False, highlight=False)
    if stays_latent(folder.images):
        _tell_of_latents(folder.images, options.folder, console)
    drawn = draw(
        folder,
        labels,
        console,
        weights=options.weights,
        sampler=options.sampler,
        steps=options.steps,
        guidance=options.guidance,
        churn=_churn(options),
        seed=options.seed,
        batch_size=options.batch_size,
    )
    _write(drawn, labels, grid, folder.images, options, console)
    return 0


def _decoded_by(vae: Path | None, folder: RunFolder) -> RunFolder:
    """The run with its autoencoder at another place.

    Raises:
        ConfigurationError: the run draws no latents, or there is no such folder.
    """
    if vae is None:
        return folder
    if folder.images.latents is None:
        raise ConfigurationError(f"{folder.path} draws images, which nothing has to decode", fix="leave --vae out")
    from dither.data.autoencoder import Autoencoder

    Autoencoder(vae)  # refuses what is none before anything is drawn
    latents = {**folder.images.latents, "vae": str(vae)}
    return replace(folder, images=replace(folder.images, latents=latents))


def _tell_of_latents(images: Images, folder: Path | None, console: Console) -> None:
    """Say before anything is drawn that it will be no images.

    Raises:
        ConfigurationError: PNGs of them are asked for.
    """
    assert images.latents is not None
    what = f"the autoencoder is no longer at {images.latents['vae']}, so latents are drawn, not images"
    if folder is not None:
        raise ConfigurationError(what, fix="say where it is now: --vae; or write --npz")
    console.print(f"{what[0].upper()}{what[1:]}. --vae says where it is now.", style="bold red", soft_wrap=True)


def balanced_labels(chosen: list[str] | None, count: int, images: Images) -> Tensor:
    """Each chosen class `count` times, (N,) int64; None is every class.

    Args:
        chosen: names or numbers.
        count: images of each.
        images: of the run, which names its classes.

    Raises:
        ConfigurationError: a count below 1.
        LabelError: no such class.
    """
    import torch

    if count < 1:
        raise ConfigurationError(f"--count {count} is below 1", fix="ask for at least one image")
    labels = range(images.num_classes) if chosen is None else [images.label(word) for word in chosen]
    return torch.tensor(labels).repeat_interleave(count)


def _churn(options: Namespace) -> Churn | None:
    from dither.diffusion.edm import Churn

    names = ("s_churn", "s_min", "s_max", "s_noise")
    given = {name: options[name] for name in names if options[name] is not None}
    return Churn(**given) if given else None


def _write(
    drawn: Tensor, labels: Tensor, grid: Path | None, images: Images, options: Namespace, console: Console
) -> None:
    """Write the files that were asked for, and say where they are."""
    import torch

    from dither.diffusion.export import save_arrays, save_folder
    from dither.diffusion.grid import first_of_each, save_grid

    shown = torch.arange(len(labels))
    if options.npz is options.folder is None:  # no more is decoded than is shown
        shown = first_of_each(labels, GRID_PER_CLASS)
    drawn, labels = pictures(drawn[shown], images), labels[shown]
    if options.npz is not None:
        with options.npz.open("wb") as file:  # a file object keeps numpy from appending .npz to the name
            save_arrays(drawn, labels, file, images.class_names or None)
        console.print(f"arrays in {options.npz}", soft_wrap=True)
    if options.folder is not None:
        written = save_folder(drawn, labels, options.folder, images.class_names or None)
        console.print(f"{written} PNGs in {options.folder}", soft_wrap=True)
    if grid is not None:
        first = first_of_each(labels, GRID_PER_CLASS)
        save_grid(drawn[first], labels[first], grid, images.class_names)
        console.print(f"{len(first)} images in {grid}", soft_wrap=True)
