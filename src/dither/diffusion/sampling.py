"""Draw images from a trained denoiser, with classifier-free guidance, through diffusers schedulers.

Shapes: N images, labels (N,), images (N, C, H, W).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dither.diffusion.process import Process
from dither.errors import ConfigurationError

SAMPLERS = ("ddim", "ddpm", "dpm-solver++")
FLOW_SAMPLERS = ("euler", "dpm-solver++")  # of a process with prediction "flow"


@torch.no_grad()
def sample(
    model: nn.Module,
    labels: Tensor | Sequence[int],
    *,
    process: Process | None = None,
    sampler: str = "ddim",
    steps: int = 50,
    guidance: float = 1.0,
    seed: int | None = None,
    generator: torch.Generator | None = None,
    batch_size: int = 256,
    image_shape: Sequence[int] | None = None,
    clip: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Draw one image per label.

    Sampling is post-processing of a trained model and costs no privacy.

    Args:
        model: called as `model(x_t, t, y, drop_label=...)`; put in eval mode here and put back after.
        labels: class of each image, (N,).
        process: the process the model was trained with; None is `Process()`.
        sampler: "ddim" (Song et al. 2021), "ddpm" (Ho et al. 2020) or "dpm-solver++" (Lu et al. 2022); "euler" (Liu
            et al. 2023) or "dpm-solver++" for flow matching.
        steps: denoising steps, at most `process.timesteps`.
        guidance: scale of classifier-free guidance (Ho & Salimans 2022),
            `unlabelled + guidance * (labelled - unlabelled)`; 1 is off, 0 ignores the labels.
        seed: seed of the noise, for the same images again (same device and `batch_size`).
        generator: source of noise instead of `seed`.
        batch_size: images denoised together.
        image_shape: (C, H, W); None asks the model (`in_channels`, `input_size`).
        clip: keep predicted images within [-1, 1]; False for latents.
        progress: called with (denoising steps done, in all).

    Returns:
        Images (N, C, H, W) in the model's dtype, on its device.

    Raises:
        ConfigurationError: an unknown sampler, steps out of range, or both `seed` and `generator`.
        LabelError: a label outside the model's range.
    """
    process = process or Process()
    if steps < 1 or steps > process.timesteps:
        raise ConfigurationError(
            f"steps {steps} is outside 1..{process.timesteps}", fix="choose between 20 and 250 steps"
        )
    if batch_size < 1:
        raise ConfigurationError(f"batch_size {batch_size} is below 1", fix="denoise at least one image")
    parameter = next(model.parameters())
    labels = torch.as_tensor(labels, dtype=torch.int64, device=parameter.device)
    generator = _generator(seed, generator, parameter.device)
    shape = tuple(image_shape) if image_shape is not None else _shape(model)
    chunks = torch.split(labels, batch_size) if len(labels) else ()
    finished: list[Tensor] = []
    with _evaluating(model):
        for index, y in enumerate(chunks):
            scheduler = _scheduler(sampler, process, clip)
            scheduler.set_timesteps(steps, device=parameter.device)
            x = torch.randn((len(y), *shape), dtype=parameter.dtype, device=parameter.device, generator=generator)
            for done, t in enumerate(scheduler.timesteps):
                output = _guided(model, x, t, y, guidance)  # none of these scales its input
                if process.learn_sigma and sampler != "ddpm":
                    output = output.chunk(2, dim=1)[0]
                output = process.denoiser_output(output, x, t)
                extra = {} if sampler == "ddim" else {"generator": generator}
                x = scheduler.step(output, t, x, **extra).prev_sample
                if progress is not None:
                    progress(index * steps + done + 1, len(chunks) * steps)
            finished.append(x.clamp(-1, 1) if clip else x)
    return torch.cat(finished) if finished else parameter.new_empty((0, *shape))


def _guided(model: nn.Module, x: Tensor, t: Tensor, y: Tensor, guidance: float) -> Tensor:
    """Predict with guidance; the labelled and unlabelled halves share one forward pass."""
    count = len(y)
    times = t.expand(count)
    shown = torch.zeros(count, dtype=torch.bool, device=y.device)
    if guidance == 1:
        output: Tensor = model(x, times, y, drop_label=shown)
        return output
    both = model(torch.cat([x, x]), torch.cat([times, times]), torch.cat([y, y]), drop_label=torch.cat([shown, ~shown]))
    labelled, unlabelled = both.chunk(2)
    mixed: Tensor = unlabelled + guidance * (labelled - unlabelled)
    return mixed


def _scheduler(sampler: str, process: Process, clip: bool) -> Any:
    """Build the diffusers scheduler that inverts `process`."""
    if process.prediction == "flow":
        return _flow_scheduler(sampler, process)
    settings = {**process.scheduler_settings(), "timestep_spacing": "trailing"}
    if sampler == "ddpm":
        from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

        variance_type = "learned_range" if process.learn_sigma else "fixed_small"
        return DDPMScheduler(**settings, clip_sample=clip, variance_type=variance_type)
    if sampler == "ddim":
        from diffusers.schedulers.scheduling_ddim import DDIMScheduler

        return DDIMScheduler(**settings, clip_sample=clip)
    if sampler == "dpm-solver++":
        from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler

        return DPMSolverMultistepScheduler(**settings, algorithm_type="dpmsolver++")
    raise ConfigurationError(
        f"sampler {sampler!r} is not known, or not for prediction {process.prediction!r}",
        fix=f"choose one of {', '.join(SAMPLERS)}",
    )


def _flow_scheduler(sampler: str, process: Process) -> Any:
    """Build the diffusers scheduler that follows a straight line back."""
    settings = process.scheduler_settings()
    if sampler == "euler":
        from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

        return FlowMatchEulerDiscreteScheduler(**settings)
    if sampler == "dpm-solver++":
        from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler

        return DPMSolverMultistepScheduler(
            **settings, prediction_type="flow_prediction", use_flow_sigmas=True, algorithm_type="dpmsolver++"
        )
    raise ConfigurationError(
        f"sampler {sampler!r} does not go with prediction 'flow'", fix=f"choose one of {', '.join(FLOW_SAMPLERS)}"
    )


def _generator(seed: int | None, generator: torch.Generator | None, device: torch.device) -> torch.Generator | None:
    if seed is not None and generator is not None:
        raise ConfigurationError("both seed and generator are given", fix="give one of them")
    return generator if seed is None else torch.Generator(device).manual_seed(seed)


def _shape(model: nn.Module) -> tuple[int, int, int]:
    try:
        side = int(model.input_size)  # type: ignore[arg-type]
        return int(model.in_channels), side, side  # type: ignore[arg-type]
    except AttributeError:
        raise ConfigurationError(
            f"{type(model).__name__} does not say its image shape", fix="pass image_shape=(C, H, W)"
        ) from None


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
