"""`dither export`: a run's model in the layout of other programs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jsonargparse import ActionConfigFile, ArgumentParser, Namespace
from rich.console import Console

from dither.cli.models import run_dit
from dither.cli.outputs import check_new_folder
from dither.cli.parsing import Formatter, parse
from dither.cli.reading import read_run_options
from dither.cli.run_folder import Images, RunFolder
from dither.errors import CheckpointError, ConfigurationError, reason_of

if TYPE_CHECKING:
    from dither.diffusion.dit import DiT

_TOGETHER = 8  # images of a forward pass: few enough for the memory of a large model

EXAMPLES = """
examples:
  dither export runs/strict --to diffusers exported --approximate
                                                         a folder for DiTPipeline.from_pretrained; exact, without
                                                         that word, after --recipe.timestep_frequencies diffusers
  dither export runs/latents --to diffusers exported --vae sd-vae-ft-mse --approximate
  dither export runs/strict --to dit exported            exported/dit.pt, as facebookresearch/DiT writes it

Exporting is post-processing of weights that are private already: it spends nothing. The certificate goes along.
"""


def export_parser() -> ArgumentParser:
    """The parser of `dither export`."""
    parser = ArgumentParser(
        prog="dither export",
        usage="dither export RUN --to diffusers|dit FOLDER [options]",
        description="Write a run's DiT in the layout of diffusers or of facebookresearch/DiT.",
        epilog=EXAMPLES,
        formatter_class=Formatter,
        exit_on_error=False,
    )
    parser.add_argument("run", type=Path, help="the folder that `dither train` wrote")
    parser.add_argument("folder", type=Path, help="a new folder")
    parser.add_argument("--config", action=ActionConfigFile, help="a YAML file of these options; words after it win")
    parser.add_argument("--to", type=Literal["diffusers", "dit"], required=True, help="whose layout")
    parser.add_argument("--weights", type=Literal["ema", "raw"], default="ema", help="which weights diffusers gets")
    parser.add_argument("--vae", type=Path | None, default=None, help="folder of the AutoencoderKL of a run on latents")
    parser.add_argument(
        "--approximate",
        action="store_true",
        help="to diffusers also where its timestep frequencies are not the model's: outputs then differ, as is printed",
    )
    return parser


def run(words: Sequence[str]) -> int:
    """Run `dither export`; returns the exit code."""
    options = parse(export_parser(), words)
    if options.to == "dit" and options.vae is not None:
        raise ConfigurationError("the published layout has no place for --vae", fix="leave --vae out")
    run_folder = RunFolder.open(options.run)
    check_new_folder(options.folder)
    console = Console(markup=False, highlight=False)
    for line in (_to_diffusers if options.to == "diffusers" else _to_dit)(run_folder, options):
        console.print(line, soft_wrap=True)
    if run_folder.certificate.is_file():
        (options.folder / "certificate.json").write_bytes(run_folder.certificate.read_bytes())
    return 0


def _to_dit(run_folder: RunFolder, options: Namespace) -> list[str]:
    from dither.diffusion.checkpoints import save_dit

    averaged, raw = run_dit(run_folder, "ema"), run_dit(run_folder, "model")
    options.folder.mkdir(parents=True, exist_ok=True)
    file = options.folder / "dit.pt"
    save_dit(file, raw, averaged.state_dict())
    return [f"{file}: 'ema' and 'model', timesteps embedded as {_frequencies(raw)} does"]


def _to_diffusers(run_folder: RunFolder, options: Namespace) -> list[str]:
    from dither.diffusion.diffusers_dit import to_diffusers
    from dither.diffusion.pipelines import save_pipeline
    from dither.diffusion.recipe import build_process

    process = build_process(read_run_options(run_folder.config).recipe)
    model = run_dit(run_folder, "ema" if options.weights == "ema" else "model")
    theirs = to_diffusers(model, approximate=options.approximate)
    vae = _autoencoder(options.vae, run_folder.images)
    save_pipeline(options.folder, theirs, process, vae)
    said = [
        f"{options.folder}: outputs differ from the run's model by {_difference(model, theirs):.1e} relative",
        f"Open it:\n  DiTPipeline.from_pretrained('{options.folder}')",
    ]
    if vae is None or vae.config.shift_factor or process.prediction == "edm":
        said[-1] = f"Open it:\n  import dither.diffusion.pipelines\n  DiTPipeline.from_pretrained('{options.folder}')"
    return said


def _frequencies(model: DiT) -> str:
    return "diffusers' DiT" if model.t_embedder.frequency_shift else "facebookresearch/DiT"


def _autoencoder(folder: Path | None, images: Images) -> Any:
    """The AutoencoderKL that a run's latents are of; None for a run on pixels.

    Raises:
        ConfigurationError: one is missing, of no use, or not the run's.
        CheckpointError: it cannot be read.
    """
    if images.latents is None:
        if folder is not None:
            raise ConfigurationError("the run is on pixels and has no use for --vae", fix="leave --vae out")
        return None
    if folder is None:
        raise ConfigurationError(
            "the run is on latents, which nobody can look at without their autoencoder",
            fix=f"--vae {images.latents['vae']}, which encoded them",
        )
    vae = _read_autoencoder(folder)
    scale, shift = images.latents["scaling_factor"], images.latents.get("shift_factor", 0.0)
    wanted = {"latent_channels": images.in_channels, "scaling_factor": scale, "shift_factor": shift}
    for name, value in wanted.items():
        if (getattr(vae.config, name) or 0.0) != value:
            raise ConfigurationError(
                f"{folder} has {name} {getattr(vae.config, name)}, the run's latents {value}",
                fix="give the autoencoder that encoded the run's data",
            )
    return vae


def _read_autoencoder(folder: Path) -> Any:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    from dither.diffusion.pipelines import ShiftedAutoencoderKL

    try:
        vae = AutoencoderKL.from_pretrained(str(folder), local_files_only=True)
        vae.to("cpu")  # fails where the folder lacks weights
        if vae.config.shift_factor:
            vae = ShiftedAutoencoderKL.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # the library raises what its readers raise
        raise CheckpointError(
            f"{folder} holds no AutoencoderKL: {reason_of(error)}", fix="give the folder that encoded the data"
        ) from error
    return vae


def _difference(model: DiT, theirs: Any) -> float:
    """Largest relative difference of the two models' outputs on random inputs at 64 timesteps."""
    import torch

    generator, count = torch.Generator().manual_seed(0), 64
    x = torch.randn(count, model.in_channels, model.input_size, model.input_size, generator=generator)
    t = torch.arange(count) * 1000 // count
    y = torch.arange(count) % model.num_classes
    difference = largest = 0.0
    with torch.no_grad():
        for part in zip(*(given.split(_TOGETHER) for given in (x, t, y)), strict=True):
            ours = model.eval()(*part)
            largest = max(largest, float(ours.abs().max()))
            difference = max(difference, float((theirs(*part).sample - ours).abs().max()))
    return difference / max(largest, 1e-30)
