"""What a run hands over: weights, certificate, samples. All of it is post-processing of private weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from dither.cli.data import pictures
from dither.cli.public import certificate_part
from dither.cli.run_folder import Images, RunFolder
from dither.errors import RunFolderError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from dither.diffusion.recipe import Recipe
    from dither.training import PrivateTraining

SAMPLE_ROWS = 16
SAMPLES_PER_ROW = 10


def write_results(folder: RunFolder, model: nn.Module, training: PrivateTraining) -> None:
    """Write raw and EMA weights and the certificate."""
    folder.save_weights("model", model.state_dict())
    folder.save_weights("ema", averaged(model, training.ema or {}))
    certificate = training.certificate()
    folder.save_certificate({**certificate, **certificate_part(folder)})


def averaged(model: nn.Module, ema: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The model's state with averages for its parameters; a tied one has its average under each of its names."""
    first = {parameter: name for name, parameter in model.named_parameters()}
    names = {name: first[parameter] for name, parameter in model.named_parameters(remove_duplicate=False)}
    return {**model.state_dict(), **{name: ema[own] for name, own in names.items() if own in ema}}


def grid_steps(steps: int, count: int) -> tuple[int, ...]:
    """The steps after which a grid is drawn: `count`, evenly spaced, before the last; public as the steps are."""
    return tuple(sorted({steps * (i + 1) // (count + 1) for i in range(count)} - {0, steps}))


def write_samples(
    file: Path,
    images: Images,
    model: nn.Module,
    recipe: Recipe,
    ema: Mapping[str, Tensor] | None,
    per_class: int = SAMPLES_PER_ROW,
    seed: int | None = None,
) -> None:
    """Draw images of each class with the EMA weights and write the labelled grid; the model keeps its own weights.

    Args:
        file: the PNG.
        images: what the model draws.
        model: of the recipe.
        recipe: says how to sample.
        ema: by name, the averaged parameters.
        per_class: images of each class.
        seed: of the sampler's noise, which protects nothing: the same start for grids that are to be compared.
    """
    import torch

    from dither.diffusion.grid import save_grid
    from dither.diffusion.recipe import build_process
    from dither.diffusion.sampling import sample

    raw = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    labels = torch.arange(min(SAMPLE_ROWS, images.num_classes)).repeat_interleave(per_class)
    try:
        load(model, averaged(model, ema or {}))
        drawn = sample(
            model,
            labels,
            process=build_process(recipe),
            sampler=recipe.sampler,
            steps=recipe.sampler_steps,
            guidance=recipe.guidance,
            seed=seed,
            clip=images.latents is None,
        )
    finally:
        load(model, raw)
    file.parent.mkdir(exist_ok=True)
    save_grid(pictures(drawn, images), labels, file, images.class_names)


def load(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Put weights into the model.

    Raises:
        RunFolderError: they are another model's.
    """
    try:
        model.load_state_dict(dict(weights))
    except RuntimeError as error:
        first = str(error).splitlines()[-1].strip()
        raise RunFolderError(
            f"the weights do not fit the model of config.yaml: {first}", fix="restore both from the same run"
        ) from error
