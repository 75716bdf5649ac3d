"""A diffusers AutoencoderKL from a local folder: images to latents, and samples back to images.

The autoencoder must be public: trained on other images than those to be protected.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from dither.data.image_data import Latents
from dither.errors import ConfigurationError, DataError, reason_of

Posterior = Literal["mean", "sample"]


class Autoencoder:
    """An AutoencoderKL, in eval mode and without gradients.

    Args:
        folder: what `save_pretrained` wrote. Nothing is downloaded.
        device: where to compute.

    Raises:
        DataError: no such folder, or no AutoencoderKL in it.
    """

    def __init__(self, folder: Path, device: torch.device | str = "cpu") -> None:
        if not (folder / "config.json").is_file():
            raise DataError(
                f"{folder} holds no autoencoder: there is no config.json",
                fix="give a folder that AutoencoderKL.save_pretrained wrote; in a pipeline's folder it is called vae",
            )
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

        try:
            self._model: Any = AutoencoderKL.from_pretrained(str(folder), local_files_only=True).eval().to(device)
        except Exception as error:  # the library raises what its readers raise
            raise DataError(
                f"{folder} holds no AutoencoderKL that diffusers can open: {reason_of(error)}", fix="save it again"
            ) from error
        self._device = device
        config = self._model.config
        self.channels = int(config.in_channels)
        self.factor = 2 ** (len(config.block_out_channels) - 1)
        self.source = Latents(str(folder.resolve()), float(config.scaling_factor), float(config.shift_factor or 0.0))

    def check_size(self, image_size: int) -> None:
        """Refuse images whose side is no multiple of the factor by which the encoder shrinks them.

        Raises:
            ConfigurationError: it is none.
        """
        if image_size % self.factor:
            raise ConfigurationError(
                f"the images' side of {image_size} pixels is no multiple of {self.factor}, by which the autoencoder "
                "shrinks them",
                fix=f"--data.image_size {-(-image_size // self.factor) * self.factor}",
            )

    @torch.no_grad()
    def encode(self, images: Tensor, posterior: Posterior = "mean") -> Tensor:
        """Images (b, C, H, W) in [-1, 1] to latents, before shift and scale, on the CPU."""
        found = self._model.encode(images.to(self._device)).latent_dist
        latents: Tensor = found.mode() if posterior == "mean" else found.sample()
        return latents.cpu()

    @torch.no_grad()
    def decode(self, latents: Tensor, batch_size: int = 16) -> Tensor:
        """Latents (n, C, H, W), shifted and scaled as models see them, to images in [-1, 1], on the CPU."""
        raw = latents / self.source.scaling_factor + self.source.shift_factor
        parts = [self._model.decode(part.to(self._device)).sample.cpu() for part in raw.split(batch_size)]
        return torch.cat(parts).clamp(-1, 1)
