"""`dither encode`: a data set of images to latents of a public autoencoder, once, before training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Literal

from jsonargparse import ActionConfigFile, ArgumentParser
from rich.console import Console
from rich.progress import Progress

from dither.cli.data import read_data
from dither.cli.options import Data
from dither.cli.parsing import Formatter, parse
from dither.errors import ConfigurationError, OutputPathError
from dither.files import replacing

EXAMPLES = """
examples:
  dither encode --data.path photos --data.image_size 256 --vae sd-vae-ft-mse --output photos.safetensors
  dither train --data.path photos.safetensors

The autoencoder must be public: trained on other images than those to be protected. Each image is encoded by itself, so
one example stays one example. Latents are as sensitive as the images.
"""


def encode_parser() -> ArgumentParser:
    """The parser of `dither encode`."""
    parser = ArgumentParser(
        prog="dither encode",
        usage="dither encode --data.path IMAGES --vae FOLDER --output FILE [options]",
        description="Encode a data set of images into latents, to train on.",
        epilog=EXAMPLES,
        formatter_class=Formatter,
        exit_on_error=False,
    )
    parser.add_argument("--config", action=ActionConfigFile, help="a YAML file of these options; words after it win")
    parser.add_class_arguments(Data, "data")
    parser.add_argument("--split", type=Literal["train", "held-out"], default="train", help="the part to encode")
    parser.add_argument("--vae", type=Path, required=True, help="folder of a diffusers AutoencoderKL")
    parser.add_argument("--output", type=Path, required=True, help="the new file, .safetensors; nothing is overwritten")
    parser.add_argument(
        "--posterior", type=Literal["mean", "sample"], default="mean", help="of each image's latent distribution"
    )
    parser.add_argument("--dtype", type=Literal["float32", "float16"], default="float32", help="as stored")
    parser.add_argument("--batch_size", type=int, default=16, help="images encoded together")
    return parser


def run(words: Sequence[str]) -> int:
    """Run `dither encode`; returns the exit code."""
    parser = encode_parser()
    made = parser.instantiate(parse(parser, words))
    if made.batch_size < 1:
        raise ConfigurationError(f"--batch_size {made.batch_size} is below 1", fix="encode at least one at a time")
    if made.output.suffix != ".safetensors":
        raise OutputPathError(f"{made.output} does not end in .safetensors", fix="dither train tells latents by that")
    import torch

    from dither.data.autoencoder import Autoencoder
    from dither.data.latents import save_latents

    console = Console(markup=False, highlight=False)
    with _new_file(made.output) as partial:
        autoencoder = Autoencoder(made.vae, "cuda" if torch.cuda.is_available() else "cpu")
        data = read_data(_with_channels(made.data, autoencoder.channels), console, made.split)
        if data.latents is not None:
            raise ConfigurationError(f"{made.data.path} holds latents already", fix="give images")
        autoencoder.check_size(data.image_size)
        parts = []
        with Progress(console=console, disable=not console.is_terminal) as bar:
            task = bar.add_task("encoding", total=len(data))
            for chosen in torch.arange(len(data)).split(made.batch_size):
                images, _ = data.batch(chosen)
                parts.append(autoencoder.encode(images, made.posterior).to(getattr(torch, made.dtype)))
                bar.advance(task, len(chosen))
        latents = torch.cat(parts)
        save_latents(partial, latents, data.labels, autoencoder.source, data.class_names)
    _, channels, side, _ = latents.shape
    console.print(
        f"{len(data)} latents of {channels} x {side} x {side} in {made.output}. Train on them:\n"
        f"  dither train --data.path {made.output}",
        soft_wrap=True,
    )
    return 0


def _with_channels(data: Data, channels: int) -> Data:
    """The data as the autoencoder takes it."""
    if data.channels not in (None, channels):
        raise ConfigurationError(
            f"--data.channels {data.channels}: the autoencoder takes {channels}", fix="leave --data.channels out"
        )
    if channels == 1:
        return replace(data, channels=1)
    if channels == 3:
        return replace(data, channels=3)
    raise ConfigurationError(f"the autoencoder takes {channels} channels", fix="use one that takes 1 or 3")


@contextmanager
def _new_file(output: Path) -> Iterator[Path]:
    """Reserve a new file, to be filled through another beside it; nothing is left if that fails.

    Raises:
        OutputPathError: it exists already or cannot be written.
    """
    try:
        output.open("xb").close()
    except FileExistsError:
        raise OutputPathError(f"{output} exists, and dither overwrites nothing", fix="give --output another") from None
    except OSError as error:
        raise OutputPathError(
            f"{output} cannot be written: {error.strerror}", fix="give a path you may write"
        ) from error
    try:
        with replacing(output) as partial:
            yield partial
    except BaseException:
        output.unlink()
        raise
