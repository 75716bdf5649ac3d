"""What a run hands over: weights, certificate, samples. All of it is post-processing of private weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from dither.cli.run_folder import RunFolder
from dither.errors import RunFolderError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from dither.diffusion.recipe import Recipe
    from dither.training import PrivateTraining

SAMPLE_ROWS = 16
SAMPLES_PER_ROW = 10


def write_results(folder: RunFolder, model: nn.Module, training: PrivateTraining) -> None:
    """Write raw and EMA weights and the certificate."""
    raw = model.state_dict()
    folder.save_weights("model", raw)
    folder.save_weights("ema", {**raw, **(training.ema or {})})
    certificate = training.certificate()
    folder.save_certificate(certificate)


def write_samples(folder: RunFolder, model: nn.Module, recipe: Recipe, ema: Mapping[str, Tensor] | None) -> None:
    """Draw ten images of each class with the EMA weights and write the labelled grid."""
    import torch

    from dither.diffusion.grid import save_grid
    from dither.diffusion.recipe import build_process
    from dither.diffusion.sampling import sample

    raw = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    load(model, {**raw, **(ema or {})})
    labels = torch.arange(min(SAMPLE_ROWS, folder.images.num_classes)).repeat_interleave(SAMPLES_PER_ROW)
    images = sample(
        model,
        labels,
        process=build_process(recipe),
        sampler=recipe.sampler,
        steps=recipe.sampler_steps,
        guidance=recipe.guidance,
    )
    save_grid(images, labels, folder.samples)
    load(model, raw)


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
