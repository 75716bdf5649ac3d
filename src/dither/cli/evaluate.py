"""`dither evaluate`: scores of generated images against real ones, a table, evaluation.json and a picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jsonargparse import ActionConfigFile, ArgumentParser, Namespace
from rich.console import Console
from rich.table import Table

from dither.cli.classes import labels_among
from dither.cli.data import pictures, read_data
from dither.cli.figures import figures
from dither.cli.held_out import read_held_out
from dither.cli.locking import evaluating_alone
from dither.cli.options import Data
from dither.cli.outputs import check_new_folder
from dither.cli.parsing import Formatter, parse
from dither.cli.run_folder import RunFolder
from dither.errors import ConfigurationError, DataError
from dither.files import make_folder, replacing

if TYPE_CHECKING:
    from torch import Tensor

    from dither.data import ImageData
    from dither.evaluation.inception import Inception

EXAMPLES = """
examples:
  dither evaluate runs/digits-20250101-120000                    draw images, compare with the run's own data
  dither evaluate runs/strict --count 500 --classifiers CNN
  dither evaluate generated.npz --data.path fashion-mnist --output evaluation-of-npz
  dither evaluate runs/strict --held_out test.npz                where the data set has no held-out part of its own
  dither evaluate runs/strict --inception_weights pt_inception-2015-12-05-6726825d.pth   FID, as others publish it
  dither evaluate runs/strict --private_score 0.5                also one accuracy that may be published

Every figure but the private score is computed from real images without noise: NOT private, for the eyes of those who
may see the data. evaluation.json marks each. The private score protects one held-out image, at a budget of its own.
"""


def evaluate_parser() -> ArgumentParser:
    """The parser of `dither evaluate`."""
    parser = ArgumentParser(
        prog="dither evaluate",
        usage="dither evaluate RUN | SAMPLES [options]",
        description="Compare generated images with real ones.",
        epilog=EXAMPLES,
        formatter_class=Formatter,
        exit_on_error=False,
    )
    parser.add_argument("source", type=Path, help="a run folder, or samples: an .npz, or a folder of images by class")
    parser.add_argument("--config", action=ActionConfigFile, help="a YAML file of these options; words after it win")
    parser.add_class_arguments(Data, "data")
    parser.add_argument(
        "--held_out",
        type=str | None,
        default=None,
        help="real images the model never saw: the held-out part of a data set as --data.path takes it, or all of one "
        "without such a part; prepared as the training images are. By default the data set's own held-out part",
    )
    parser.add_argument("--count", type=int, default=150, help="images of each class that are drawn from a run")
    parser.add_argument(
        "--classifiers",
        type=str,
        nargs="*",
        default=["logistic regression", "MLP", "CNN"],
        help="trained on generated images, tested on real held-out ones",
    )
    parser.add_argument(
        "--features",
        type=Literal["cnn", "inception"] | None,
        default=None,
        help="what distances are measured on; by default inception where its weights are given, else cnn",
    )
    parser.add_argument(
        "--inception_weights",
        type=Path | None,
        default=None,
        help="a file of Inception v3's weights, pytorch-fid's (FID) or torchvision's; nothing is downloaded",
    )
    parser.add_argument("--seed", type=int | None, default=None, help="the same drawn images again")
    parser.add_argument(
        "--output", type=Path | None, default=None, help="folder of the results; by default the run folder"
    )
    parser.add_argument(
        "--private_score", type=float | None, default=None, help="epsilon to spend on one accuracy of held-out images"
    )
    parser.add_argument("--private_delta", type=float, default=1e-5, help="delta of the private score")
    return parser


def run(words: Sequence[str]) -> int:
    """Run `dither evaluate`; returns the exit code."""
    options = parse(evaluate_parser(), words)
    _check(options)
    console = Console(markup=False, highlight=False)
    folder = RunFolder.open(options.source) if (options.source / "run.json").is_file() else None
    output = options.output or (None if folder is None else folder.path)
    if output is None:
        raise ConfigurationError("samples have no folder for results", fix="give one: --output evaluation")
    if options.output is not None:
        check_new_folder(output)
    with evaluating_alone(output) if options.output is None else nullcontext():
        _evaluate(options, folder, output, console)
    return 0


def _evaluate(options: Namespace, folder: RunFolder | None, output: Path, console: Console) -> None:
    """Read, draw, compare, and write the figures to the folder of results."""
    earlier = _earlier(output)
    inception = _inception(options)
    training, held_out = _real(options, folder, console)
    generated, labels = _generated(options, folder, training, console)
    if generated.shape[1:] != (training.channels, training.image_size, training.image_size):
        raise DataError(
            f"the samples are of shape {tuple(generated.shape[1:])}, the real images of "
            f"{(training.channels, training.image_size, training.image_size)}",
            fix="prepare both alike: --data.image_size, --data.channels",
        )
    make_folder(output)
    found = figures(options, generated, labels, training, held_out, output, earlier, inception, console)
    with replacing(output / "evaluation.json") as partial:  # it is the account of earlier private scores
        partial.write_text(json.dumps(found, indent=2) + "\n")
    _show(found, console)
    console.print(f"Figures in {output / 'evaluation.json'}", soft_wrap=True)


def _check(options: Namespace) -> None:
    from dither.accounting.events import check_delta, check_epsilon
    from dither.evaluation import CLASSIFIERS

    for name in options.classifiers:
        if name not in CLASSIFIERS:
            raise ConfigurationError(f"there is no classifier {name!r}", fix=f"choose of {', '.join(CLASSIFIERS)}")
    if options.count < 2:
        raise ConfigurationError(f"--count {options.count} is below 2", fix="150 images of each class are a fair test")
    check_delta(options.private_delta)
    if options.private_score is not None:
        check_epsilon(options.private_score)
        if not options.classifiers:
            raise ConfigurationError("a private score needs a classifier", fix="--classifiers CNN")


def _inception(options: Namespace) -> Inception | None:
    """The network of the features, read before anything is drawn; None for a CNN's features."""
    if options.features == "cnn" and options.inception_weights is not None:
        raise ConfigurationError("--features cnn has no use for --inception_weights", fix="leave one of them out")
    if options.features != "inception" and options.inception_weights is None:
        return None
    from dither.evaluation.inception import load_inception

    return load_inception(options.inception_weights)


def _earlier(output: Path) -> list[float]:
    """Noise multipliers of private scores that were released from the same held-out images before."""
    file = output / "evaluation.json"
    if not file.is_file():
        return []
    try:
        kept = json.loads(file.read_text())
        return [float(noise) for noise in kept.get("private_score", {}).get("noise_multipliers", {}).get("value", [])]
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise DataError(
            f"{file} is damaged, and may hold what was spent before: {error}", fix="restore it, or give --output"
        ) from None


def _real(options: Namespace, folder: RunFolder | None, console: Console) -> tuple[ImageData, ImageData]:
    from dither.cli.reading import read_run_options

    data = Data(**options.data.as_dict())
    if folder is not None and data.path is None:  # the run's own data, with what is said of it here
        said = {name: value for name, value in asdict(data).items() if value != getattr(Data(), name)}
        data = replace(read_run_options(folder.config).data, **said)
    training = read_data(data, console)
    if training.latents is not None:
        raise DataError(f"{data.path} holds latents", fix="give the images that they are of: --data.path")
    held_out = read_held_out(options.held_out, data, training, console)
    _check_memory(training, held_out)
    return training, held_out


def _check_memory(*parts: ImageData) -> None:
    """Refuse, before anything is drawn, more real images than there is room for: all of them are compared at once.

    Raises:
        ConfigurationError: with the numbers.
    """
    import torch

    from dither.clipping.machine import free_memory

    needed = sum(4.0 * len(part) * part.channels * part.image_size**2 for part in parts)  # float32
    free = free_memory(torch.device("cpu"))
    if needed > free:
        raise ConfigurationError(
            f"the real images take {needed / 2**30:.1f} GiB of memory, and {free / 2**30:.1f} GiB are free",
            fix="evaluate smaller pictures, --data.image_size, or a part of the data set, --data.path",
        )


def _generated(
    options: Namespace, folder: RunFolder | None, real: ImageData, console: Console
) -> tuple[Tensor, Tensor]:
    if folder is None:
        samples = _samples(options.source, real)
        images, labels = samples.batch()
        return images, labels_among(real.class_names, labels, samples.class_names, options.source)
    from dither.cli.drawing import draw
    from dither.cli.sample import balanced_labels

    labels = balanced_labels(None, options.count, folder.images)
    theirs = labels_among(real.class_names, labels, folder.images.class_names, folder.path)  # before anything is drawn
    return pictures(draw(folder, labels, console, seed=options.seed), folder.images), theirs


def _samples(source: Path, real: ImageData) -> ImageData:
    """Samples with the class names that their files state, else with as many numbers as there are real classes."""
    from dither.data import classes_are_folders, read_images

    if classes_are_folders(source):
        return read_images(source, class_names=real.class_names)
    try:
        return read_images(source)
    except DataError:
        return read_images(source, num_classes=real.num_classes)


def _show(found: dict[str, Any], console: Console) -> None:
    table = Table("", "", "", show_header=False, box=None)
    for name, parts in found.items():
        for part, figure in parts.items():
            if "value" not in figure:  # a classifier, with its classes
                figure = figure["all"]
            value = figure["value"]
            said = f"{value:.4g}" if isinstance(value, float) else str(value)
            table.add_row(f"{name} {part}".replace("_", " "), said, "" if figure["private"] else "non-private")
    console.print(table)
