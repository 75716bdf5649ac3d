"""What a diffusers `DiTPipeline` needs of dither when it opens an exported folder: import this module before.

A run on pixels has no autoencoder, the prediction "edm" no scheduler in diffusers, and `DiTPipeline` does not know an
autoencoder's shift; all three are here. A run on latents without shift, with another prediction, needs none of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import DiTPipeline
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from dither.diffusion.process import Process
from dither.diffusion.schedulers import build_scheduler
from dither.errors import OutputPathError

# diffusers looks both bases up in the module of a component, to know how to load it.
__all__ = [
    "ModelMixin",
    "PixelDecoder",
    "PreconditionedDDIMScheduler",
    "SchedulerMixin",
    "ShiftedAutoencoderKL",
    "save_pipeline",
]


class PixelDecoder(ModelMixin, ConfigMixin):
    """An autoencoder that leaves pixels as they are."""

    config_name = "config.json"

    @register_to_config
    def __init__(self, scaling_factor: float = 1.0) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(()))  # diffusers asks a component for its dtype and saves a file

    def decode(self, latents: Tensor) -> DecoderOutput:
        """Images (B, C, H, W) as they came; grey ones as three equal channels, which PIL can show."""
        return DecoderOutput(sample=latents.repeat(1, 3, 1, 1) if latents.shape[1] == 1 else latents)


class ShiftedAutoencoderKL(AutoencoderKL):
    """An AutoencoderKL whose latents were shifted: `DiTPipeline` takes back the scale only."""

    def decode(self, z: Tensor, *args: Any, **options: Any) -> Any:
        """Images of latents (B, C, H, W) that are no longer scaled, and still shifted."""
        return super().decode(z + float(self.config.shift_factor or 0.0), *args, **options)


class PreconditionedDDIMScheduler(DDIMScheduler):
    """DDIM for a network that predicts what `Process` calls "edm".

    Args:
        sigma_data: as in `Process`.
        num_train_timesteps: noise levels of the process.
        beta_schedule: of the process.
        clip_sample: keep predicted images within [-1, 1].
    """

    @register_to_config
    def __init__(
        self,
        sigma_data: float = 0.5,
        num_train_timesteps: int = 1000,
        beta_schedule: str = "linear",
        clip_sample: bool = True,
    ) -> None:
        self._process = Process(num_train_timesteps, beta_schedule, prediction="edm", sigma_data=sigma_data)
        super().__init__(**self._process.scheduler_settings(), clip_sample=clip_sample, timestep_spacing="trailing")

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **options: Any) -> Any:
        """One step of DDIM from the network's output and x_t, both (B, C, H, W)."""
        denoised = self._process.denoiser_output(model_output, sample, torch.as_tensor(timestep))
        return super().step(denoised, timestep, sample, *args, **options)


def save_pipeline(folder: Path, transformer: Any, process: Process, vae: Any = None) -> None:
    """Write a folder that `DiTPipeline.from_pretrained` opens.

    Args:
        folder: a new one.
        transformer: a `DiTTransformer2DModel`.
        process: the one that it was trained with.
        vae: an `AutoencoderKL`, a `ShiftedAutoencoderKL` where it has a shift, if the run is on latents; None leaves
            pixels as they are.

    Raises:
        OutputPathError: the folder cannot be written.
    """
    if process.prediction == "edm":
        scheduler = PreconditionedDDIMScheduler(
            process.sigma_data, process.timesteps, process.beta_schedule, clip_sample=vae is None
        )
    else:
        scheduler = build_scheduler("euler" if process.prediction == "flow" else "ddim", process, vae is None)
    try:
        DiTPipeline(transformer, PixelDecoder() if vae is None else vae, scheduler).save_pretrained(str(folder))
    except OSError as error:
        raise OutputPathError(f"{folder} cannot be written: {error}", fix="give a folder you may write") from error
