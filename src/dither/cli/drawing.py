"""Images from a run folder, with a bar that shows how far they are."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from dither.cli.models import run_model
from dither.cli.reading import read_run_options
from dither.cli.results import load
from dither.cli.run_folder import RunFolder
from dither.errors import RunFolderError

if TYPE_CHECKING:
    from torch import Tensor

    from dither.diffusion.edm import Churn


def draw(
    folder: RunFolder,
    labels: Tensor,
    console: Console,
    *,
    weights: str = "ema",
    sampler: str | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    churn: Churn | None = None,
    seed: int | None = None,
    batch_size: int = 256,
) -> Tensor:
    """Draw one image per label (N,) from the run's model; what is None is the run's own setting.

    Args:
        folder: the run.
        labels: chosen without looking at the private data.
        console: where the bar is shown, if it is a terminal.
        weights: "ema" or "raw".
        sampler: one of `dither.diffusion.SAMPLERS`.
        steps: denoising steps.
        guidance: scale of classifier-free guidance.
        churn: fresh noise of the sampler "edm".
        seed: the same images again.
        batch_size: images denoised together.

    Returns:
        Images (N, C, H, W).

    Raises:
        RunFolderError: the run is not complete, damaged, or has diverged: its images are not finite.
        ConfigurationError: a setting that cannot work.
    """
    options = read_run_options(folder.config)
    recipe = options.recipe if sampler is None else replace(options.recipe, sampler=sampler)
    tensors = folder.load_weights("ema" if weights == "ema" else "model")

    from dither.diffusion.recipe import build_process
    from dither.diffusion.sampling import sample

    model = run_model(folder, replace(options, recipe=recipe))
    load(model, tensors)
    with _bar(console) as bar:
        task = bar.add_task(f"drawing {len(labels)} images", total=None)
        drawn = sample(
            model,
            labels,
            process=build_process(recipe),
            sampler=recipe.sampler,
            steps=recipe.sampler_steps if steps is None else steps,
            guidance=recipe.guidance if guidance is None else guidance,
            churn=churn,
            seed=seed,
            clip=folder.images.latents is None,
            batch_size=batch_size,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    if not bool(drawn.isfinite().all()):
        raise RunFolderError(
            f"images drawn from {folder.path} are not finite: its training has diverged",
            fix="train again with a smaller --recipe.learning_rate",
        )
    return drawn


def _bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    )
