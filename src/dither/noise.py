"""Gaussian noise: its stream, its key, its grid.

Limits, plainly. The normal numbers on a CPU come from numpy's SFC64 generator and ziggurat, on CUDA from torch's
Philox and Box-Muller; both are keyed by the operating system's entropy, 256 and 64 bits a draw. Neither is proved
secure against an adversary who recovers the generator's state from released values; that attack needs exact noise
values, which nobody sees: a released gradient is noise plus an unknown sum, rounded. `torch.Generator` is not used on
the CPU because it keeps 32 bits of its seed and its float32 normals stop at 5.8 standard deviations.

Floating point. Noise is drawn in float64, scaled and added to the tensor in float64, and rounded once to the tensor's
dtype. A float32 gradient therefore sits on a grid 2^29 times coarser than the noise's own, and which float32 values
can occur does not depend on the data, which is what Mironov's attack needs (Mironov, "On significance of the least
significant bits for differential privacy", CCS 2012). A float64 tensor has no coarser grid to be rounded to; its noise
is the scaled sum of four draws, after Holohan and Braghin, "Secure random sampling in differential privacy", 2021.
This makes the attack impractical; it is not a proof of exact differential privacy in floating point, which needs a
discrete mechanism.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from dither.errors import ConfigurationError

_CHUNK = 1 << 17  # numbers drawn at a time: one megabyte of float64, which stays in cache
_DRAWS_IN_FLOAT64 = 4
_ENTROPY_BITS = 256
_NOISE, _TORCH, _BATCH = 1, 2, 3  # purposes, so that no two streams of a seeded run coincide


def check_seed(seed: int | None) -> None:
    """Refuse a seed that is not an integer of at least zero.

    Raises:
        ConfigurationError: seed is negative or not an integer.
    """
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or seed < 0):
        raise ConfigurationError(
            f"seed must be an integer of at least 0, or None; it is {seed!r}.",
            fix="seed=None for a private run; a seed makes the noise predictable",
        )


def sequence(seed: int | None, step: int, purpose: int) -> np.random.SeedSequence:
    """The key of one stream: fresh from the operating system, or derived from (seed, step, purpose)."""
    if seed is None:
        return np.random.SeedSequence(secrets.randbits(_ENTROPY_BITS))
    return np.random.SeedSequence([seed, step, purpose])


def torch_seed(seed: int, step: int) -> int:
    """Seed of torch's global generators (dropout, diffusion noise) in one step of a seeded run."""
    return int(sequence(seed, step, _TORCH).generate_state(1, np.uint64)[0] >> np.uint64(1))


class GaussianNoise:
    """A stream of Gaussian noise: one independent draw per call.

    Without a seed every call takes a new key from the operating system's entropy and forgets it, so nothing can be
    stored, repeated after a resume, or shared between processes.

    Guarantee: with standard deviation noise_multiplier * sensitivity, each call makes the sum it is added to the
    output of the Gaussian mechanism (Abadi et al. 2016, algorithm 1), in the model of real arithmetic; see the module's
    text for floating point. With a seed there is no guarantee: who knows the seed can subtract the noise.

    Args:
        seed: None, or an integer that makes the noise a function of (seed, step): not private.

    Raises:
        ConfigurationError: seed is negative or not an integer.
    """

    def __init__(self, seed: int | None = None) -> None:
        check_seed(seed)
        self._seed = seed

    @property
    def private(self) -> bool:
        """Whether the key is fresh entropy."""
        return self._seed is None

    def add_(
        self, tensors: Mapping[str, Tensor] | Iterable[Tensor], standard_deviation: float, *, step: int = 0
    ) -> None:
        """Add independent noise to every element of every tensor, in place. Call once per logical batch.

        Args:
            tensors: floating point, any shapes and devices.
            standard_deviation: of each element's noise, in the tensors' unit; not negative.
            step: index of the logical batch; matters only under a seed.

        Raises:
            ConfigurationError: the standard deviation is negative or not finite, or a tensor is not floating point.
        """
        if not 0.0 <= standard_deviation < math.inf:
            raise ConfigurationError(
                f"standard_deviation must be finite and at least 0; it is {standard_deviation}.",
                fix="pass noise_multiplier * sensitivity",
            )
        targets = list(tensors.values() if isinstance(tensors, Mapping) else tensors)
        for tensor in targets:
            if not tensor.is_floating_point():
                raise ConfigurationError(
                    f"Noise needs floating-point tensors; one of shape {tuple(tensor.shape)} is {tensor.dtype}.",
                    fix="pass gradients",
                )
        keys = sequence(self._seed, step, _NOISE).spawn(len(targets))
        if standard_deviation == 0.0:
            return
        with torch.no_grad():
            on_cpu = [(t, key) for t, key in zip(targets, keys, strict=True) if t.device.type != "cuda"]
            for tensor, key in zip(targets, keys, strict=True):
                if tensor.device.type == "cuda":
                    _add_cuda(tensor, standard_deviation, key)
            _add_cpu(on_cpu, standard_deviation)


def _draws(tensor: Tensor) -> int:
    return _DRAWS_IN_FLOAT64 if tensor.dtype == torch.float64 else 1


def _add_cpu(targets: list[tuple[Tensor, np.random.SeedSequence]], standard_deviation: float) -> None:
    """Every chunk has its own key, so that the result does not depend on the number of threads."""
    jobs = []
    for tensor, key in targets:
        in_place = tensor.device.type == "cpu" and tensor.is_contiguous()
        flat = tensor.view(-1) if in_place else tensor.cpu().reshape(-1)
        starts = range(0, flat.numel(), _CHUNK)
        chunks = [flat[start : start + _CHUNK] for start in starts]
        jobs.append((tensor, None if in_place else flat, list(zip(chunks, key.spawn(len(starts)), strict=True))))
    work = [(chunk, key, standard_deviation, _draws(tensor)) for tensor, _, chunks in jobs for chunk, key in chunks]
    threads = min(torch.get_num_threads(), len(work))
    if threads > 1:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(_add_chunk, work))
    else:
        for item in work:
            _add_chunk(item)
    for tensor, copy, _ in jobs:
        if copy is not None:
            tensor.copy_(copy.view(tensor.shape))


def _add_chunk(work: tuple[Tensor, np.random.SeedSequence, float, int]) -> None:
    chunk, key, standard_deviation, draws = work
    generator = np.random.Generator(np.random.SFC64(key))
    normal = generator.standard_normal(chunk.numel())
    for _ in range(draws - 1):
        normal += generator.standard_normal(chunk.numel())
    normal *= standard_deviation / math.sqrt(draws)
    with torch.no_grad():  # the mode is per thread
        chunk.copy_(torch.from_numpy(normal).add_(chunk))


def _add_cuda(tensor: Tensor, standard_deviation: float, key: np.random.SeedSequence) -> None:
    generator = torch.Generator(tensor.device)
    generator.manual_seed(int(key.generate_state(1, np.uint64)[0] >> np.uint64(1)))
    draws = _draws(tensor)
    flat = tensor.view(-1) if tensor.is_contiguous() else tensor.reshape(-1)
    for start in range(0, flat.numel(), 1 << 24):
        chunk = flat[start : start + (1 << 24)]
        normal = torch.zeros(chunk.numel(), dtype=torch.float64, device=tensor.device)
        for _ in range(draws):
            normal += torch.randn(normal.shape, dtype=torch.float64, device=tensor.device, generator=generator)
        chunk.copy_(normal.mul_(standard_deviation / math.sqrt(draws)).add_(chunk))
    if flat.data_ptr() != tensor.data_ptr():
        tensor.copy_(flat.view(tensor.shape))
