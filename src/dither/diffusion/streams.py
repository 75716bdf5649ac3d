"""Noise for sampling: a stream of its own for each image, so that batches do not matter.

This noise makes pictures. It protects nobody; the noise that does is in `dither.noise`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dither.errors import ConfigurationError

_GENERATOR_SEEDS = 2**32  # torch's CPU generator keeps 32 bits of its seed


@dataclass
class Noise:
    """Standard normal noise for the images of one batch.

    Args:
        generators: one for each image.
        shape: of one image, (C, H, W).
        dtype: of the noise.
        device: where it is put; it is drawn on the CPU, so that it is the same on every device.
    """

    generators: list[torch.Generator]
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def __call__(self) -> Tensor:
        """Draw (b, C, H, W)."""
        drawn = [torch.randn(self.shape, dtype=self.dtype, generator=generator) for generator in self.generators]
        return torch.stack(drawn).to(self.device)


class NoiseStreams:
    """The noise of every image of one call of `sample`.

    Args:
        shape: of one image, (C, H, W).
        dtype: of the noise.
        device: where it is put.
        seed: names all streams; None draws one.
        generator: where that seed is drawn from; None is torch's global one.

    Raises:
        ConfigurationError: both `seed` and `generator`.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        seed: int | None,
        generator: torch.Generator | None,
    ) -> None:
        if seed is not None and generator is not None:
            raise ConfigurationError("both seed and generator are given", fix="give one of them")
        if seed is None:
            where = generator.device if generator is not None else None
            seed = int(torch.randint(2**62, (), generator=generator, device=where))
        if seed < 0:
            raise ConfigurationError(f"seed {seed} is below 0", fix="give a number from 0 on")
        self._shape, self._dtype, self._device = shape, dtype, device
        self._first = int(np.random.SeedSequence(seed).generate_state(1)[0])

    def of(self, places: Sequence[int]) -> Noise:
        """The noise of the images at these places in the labels; no two of 2^32 places share a stream."""
        generators = [torch.Generator().manual_seed((self._first + place) % _GENERATOR_SEEDS) for place in places]
        return Noise(generators, self._shape, self._dtype, self._device)
