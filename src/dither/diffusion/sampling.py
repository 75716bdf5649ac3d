"""Draw images from a trained denoiser, with classifier-free guidance.

DDPM, DDIM and DPM-Solver++ are diffusers' schedulers; EDM is in `dither.diffusion.edm`.

Shapes: N images, labels (N,), images (N, C, H, W).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dither.diffusion.edm import Churn, edm_sample
from dither.diffusion.process import Process
from dither.diffusion.schedulers import FLOW_SAMPLERS as FLOW_SAMPLERS
from dither.diffusion.schedulers import SAMPLERS as SAMPLERS
from dither.diffusion.schedulers import build_scheduler, check_sampler
from dither.diffusion.streams import Noise, NoiseStreams
from dither.errors import ConfigurationError


def sample(
    model: nn.Module,
    labels: Tensor | Sequence[int],
    *,
    process: Process | None = None,
    sampler: str = "ddim",
    steps: int = 50,
    guidance: float = 1.0,
    churn: Churn | None = None,
    seed: int | None = None,
    generator: torch.Generator | None = None,
    batch_size: int = 256,
    image_shape: Sequence[int] | None = None,
    clip: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Draw one image per label.

    Sampling is post-processing of a trained model and costs no privacy, as long as the labels are not taken from the
    private data: their histogram is private too.

    Args:
        model: called as `model(x_t, t, y, drop_label=...)`; put in eval mode here and put back after.
        labels: class of each image, (N,).
        process: the process the model was trained with; None is `Process()`.
        sampler: "ddim" (Song et al. 2021), "ddpm" (Ho et al. 2020), "dpm-solver++" (Lu et al. 2022) or "edm" (Karras
            et al. 2022, algorithm 2: second order, so it calls the model twice a step); "euler" (Liu et al. 2023) or
            "dpm-solver++" for flow matching.
        steps: denoising steps, at most `process.timesteps`.
        guidance: scale of classifier-free guidance (Ho & Salimans 2022),
            `unlabelled + guidance * (labelled - unlabelled)`; 1 is off, 0 ignores the labels.
        churn: fresh noise of "edm"; None is none.
        seed: seed of the noise. Each image has its own stream, by its place in `labels`: the same seed gives the same
            images whatever `batch_size`, up to the rounding of the model's matrix products.
        generator: where the seed is drawn from instead; None is torch's global one.
        batch_size: images denoised together.
        image_shape: (C, H, W); None asks the model (`in_channels`, `input_size`).
        clip: keep predicted images within [-1, 1]; False for latents.
        progress: called with (denoising steps done, in all).

    Returns:
        Images (N, C, H, W) in the model's dtype, on its device.

    Raises:
        ConfigurationError: an unknown sampler, steps out of range, both `seed` and `generator`, or churn of another
            sampler than "edm".
        LabelError: a label outside the model's range.
    """
    process = process or Process()
    _check(sampler, steps, process, batch_size, churn)
    parameter = next(model.parameters())
    labels = torch.as_tensor(labels, dtype=torch.int64, device=parameter.device)
    shape = tuple(image_shape) if image_shape is not None else _shape(model)
    streams = NoiseStreams(shape, parameter.dtype, parameter.device, seed, generator)
    chunks = torch.split(labels, batch_size) if len(labels) else ()
    done = 0

    def count() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, len(chunks) * steps)

    finished: list[Tensor] = []
    with evaluating(model), torch.inference_mode():
        for index, y in enumerate(chunks):
            denoiser = _Denoiser(model, y, process, guidance, clip)
            noise = streams.of(range(index * batch_size, index * batch_size + len(y)))
            if sampler == "edm":
                x = edm_sample(denoiser.clean, process, noise, steps, churn or Churn(), count)
            else:
                x = _scheduled(denoiser, sampler, noise, steps, count)
            finished.append(x.clamp(-1, 1) if clip else x)
    # Joined out here: what inference mode makes can never take part in a gradient.
    return torch.cat(finished) if finished else parameter.detach().new_empty((0, *shape))


@dataclass(frozen=True)
class _Denoiser:
    """The model for one batch of labels y (b,), guided.

    With guidance the labelled and unlabelled halves share one forward pass.
    """

    model: nn.Module
    y: Tensor
    process: Process
    guidance: float
    clip: bool

    def output(self, x: Tensor, t: Tensor) -> Tensor:
        """What the network says at x_t (b, C, H, W) and t, 0-dimensional."""
        shown = torch.zeros(len(self.y), dtype=torch.bool, device=self.y.device)
        times = t.expand(len(self.y))
        if self.guidance == 1:
            alone: Tensor = self.model(x, times, self.y, drop_label=shown)
            return alone
        hidden = torch.cat([shown, ~shown])
        both = self.model(torch.cat([x, x]), times.repeat(2), self.y.repeat(2), drop_label=hidden)
        labelled, unlabelled = both.chunk(2)
        mixed: Tensor = unlabelled + self.guidance * (labelled - unlabelled)
        return mixed

    def for_scheduler(self, x: Tensor, t: Tensor, keep_variance: bool = False) -> Tensor:
        """What a diffusers scheduler expects; `keep_variance` for the one that uses a learned variance."""
        output = self.output(x, t)
        if self.process.learn_sigma and not keep_variance:
            output = output.chunk(2, dim=1)[0]
        return self.process.denoiser_output(output, x, t)

    def clean(self, x: Tensor, t: Tensor) -> Tensor:
        """The predicted clean image."""
        output = self.for_scheduler(x, t)
        signal, noise = self.process.signal_and_noise(t)
        if self.process.prediction == "epsilon":
            output = (x - noise * output) / signal
        elif self.process.prediction == "v":
            output = signal * x - noise * output
        return output.clamp(-1, 1) if self.clip else output


def _scheduled(denoiser: _Denoiser, sampler: str, noise: Noise, steps: int, count: Callable[[], None]) -> Tensor:
    """Denoise one batch by a diffusers scheduler."""
    scheduler = build_scheduler(sampler, denoiser.process, denoiser.clip)
    x = noise()
    scheduler.set_timesteps(steps, device=x.device)
    for t in scheduler.timesteps:
        output = denoiser.for_scheduler(x, t, keep_variance=sampler == "ddpm")  # none of these scales its input
        extra = {"generator": noise.generators} if sampler == "ddpm" else {}
        x = scheduler.step(output, t, x, **extra).prev_sample
        count()
    return x


def _check(sampler: str, steps: int, process: Process, batch_size: int, churn: Churn | None) -> None:
    """Refuse what cannot work."""
    check_sampler(sampler, process.prediction)
    if steps < 1 or steps > process.timesteps:
        raise ConfigurationError(
            f"steps {steps} is outside 1..{process.timesteps}", fix="choose between 20 and 250 steps"
        )
    if batch_size < 1:
        raise ConfigurationError(f"batch_size {batch_size} is below 1", fix="denoise at least one image")
    if churn is not None and sampler != "edm":
        raise ConfigurationError(f"sampler {sampler!r} has no churn", fix="use sampler='edm', or leave churn out")


def _shape(model: nn.Module) -> tuple[int, int, int]:
    try:
        side, channels = (int(getattr(model, name)) for name in ("input_size", "in_channels"))
        return channels, side, side
    except AttributeError:
        raise ConfigurationError(
            f"{type(model).__name__} does not say its image shape", fix="pass image_shape=(C, H, W)"
        ) from None


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in eval mode, and each of its modules back in its own after."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
