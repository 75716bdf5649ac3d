"""Gaussian noise: its stream, its key, its grid.

Limits, plainly. On a CPU the bits are AES-128's in counter mode, under a key from the operating system's entropy, new
for each draw: who predicts them breaks AES. On CUDA the numbers are torch's, Philox and Box-Muller under 64 bits of
entropy, not proved secure against an adversary who recovers the generator's state from released values; that attack
needs exact noise values, which nobody sees: a released gradient is noise plus an unknown sum, rounded.
`torch.Generator` is not used on the CPU because it keeps 32 bits of its seed and its float32 normals stop at 5.8
standard deviations.

Floating point. The noise is added to the tensor, and the sum divided, in float64; the result is rounded once to the
tensor's dtype (to 16 bits by way of float32). On a CPU the noise lies on steps of 2^-39 standard deviations and finer
(`dither.normals` says how), on CUDA it is drawn in float64. Near one standard deviation a float32 gradient therefore
sits on a grid 2^15 times coarser than the noise's own or more, and which float32 values can occur does not depend on
the data, which is what Mironov's attack needs (Mironov, "On significance of the least significant bits for differential
privacy", CCS 2012). A float64 tensor has no coarser grid to be rounded to; its noise is the scaled sum of four draws,
each transformed in float64, after Holohan and Braghin, "Secure random sampling in differential privacy", 2021. This
makes the attack impractical; it is not a proof of exact differential privacy in floating point, which needs a discrete
mechanism.

Time. A step of fused AdamW is bound by memory and takes no longer than AES needs for the noise's bits alone. An update,
noise and that step, took 5.7 of such a step with two threads and 8.2 with one (a DiT of 45 million parameters, on two
cores). `dither.normals` lists what was measured.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from dither.errors import ConfigurationError
from dither.normals import BLOCK, KEY_BYTES, Array, Normals

_CUDA_CHUNK = 1 << 24
_DRAWS_IN_FLOAT64 = 4
_ENTROPY_BITS = 256
# Purposes, so that no two streams of a seeded run coincide.
_NOISE, _TORCH, _BATCH, _CLASS_MEANS, _CLASS_GAUSSIANS, _CLASS_MIXTURES = 1, 2, 3, 4, 5, 6


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


def derived_seed(seed: int | None, purpose: int) -> int | None:
    """A run's seed for one purpose of its own; None stays fresh entropy."""
    return None if seed is None else int(sequence(seed, 0, purpose).generate_state(1)[0])


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
        self,
        tensors: Mapping[str, Tensor] | Iterable[Tensor],
        standard_deviation: float,
        *,
        step: int = 0,
        divisor: float = 1.0,
    ) -> None:
        """Add independent noise to every element of every tensor, in place. Call once per logical batch.

        Args:
            tensors: floating point, any shapes and devices.
            standard_deviation: of each element's noise, in the tensors' unit; not negative.
            step: index of the logical batch; matters only under a seed.
            divisor: what the noisy tensors are divided by, in the same pass: a public constant such as the expected
                batch size.

        Raises:
            ConfigurationError: the standard deviation is negative or not finite, the divisor is not positive and
                finite, or a tensor is not floating point.
        """
        if not 0.0 <= standard_deviation < math.inf:
            raise ConfigurationError(
                f"standard_deviation must be finite and at least 0; it is {standard_deviation}.",
                fix="pass noise_multiplier * sensitivity",
            )
        if not 0.0 < divisor < math.inf:
            raise ConfigurationError(
                f"divisor must be finite and above 0; it is {divisor}.", fix="pass the expected batch size"
            )
        targets = list(tensors.values() if isinstance(tensors, Mapping) else tensors)
        for tensor in targets:
            if not tensor.is_floating_point():
                raise ConfigurationError(
                    f"Noise needs floating-point tensors; one of shape {tuple(tensor.shape)} is {tensor.dtype}.",
                    fix="pass gradients",
                )
        with torch.no_grad():
            if standard_deviation == 0.0:
                for tensor in targets:
                    tensor.div_(divisor)
                return
            on_cuda = [tensor for tensor in targets if tensor.device.type == "cuda"]
            if on_cuda:
                keys = sequence(self._seed, step, _NOISE).spawn(2 + len(on_cuda))
                for tensor, key in zip(on_cuda, keys[2:], strict=True):
                    _add_cuda(tensor, standard_deviation, divisor, key)
            for wide in (False, True):
                chosen = [t for t in targets if t.device.type != "cuda" and (t.dtype == torch.float64) == wide]
                if chosen:
                    _add_cpu(chosen, standard_deviation, divisor, self._aes_key(step, wide), wide)

    def _aes_key(self, step: int, wide: bool) -> bytes:
        if self._seed is None:
            return secrets.token_bytes(KEY_BYTES)
        return bytes(sequence(self._seed, step, _NOISE).spawn(2)[wide].generate_state(KEY_BYTES // 4))


def _add_cpu(tensors: list[Tensor], standard_deviation: float, divisor: float, key: bytes, wide: bool) -> None:
    """Blocks of the stream go to the tensors end to end, so that the result does not depend on the threads."""
    flats = [_flat(tensor, wide) for tensor in tensors]
    blocks = list(enumerate(_blocks([flat.numpy() for flat in flats])))
    threads = max(1, min(torch.get_num_threads(), len(blocks)))
    size = min(BLOCK, sum(flat.numel() for flat in flats))

    def work(first: int) -> None:
        normals, buffer = Normals(key, size, wide=wide), np.empty(size)
        for number, pieces in blocks[first::threads]:
            noise = normals.draw(number, sum(map(len, pieces)), standard_deviation / divisor)
            _add_block(noise, pieces, buffer, 1.0 / divisor)

    if threads > 1:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(work, range(threads)))
    else:
        work(0)
    for tensor, flat in zip(tensors, flats, strict=True):
        if flat.data_ptr() != tensor.data_ptr():
            tensor.copy_(flat.view(tensor.shape))


def _flat(tensor: Tensor, wide: bool) -> Tensor:
    """The tensor's own memory where numpy can add to it, or a copy."""
    tensor = tensor.detach()
    return tensor.to("cpu", torch.float64 if wide else torch.float32).contiguous().view(-1)


def _blocks(flats: list[Array]) -> Iterator[list[Array]]:
    """Cut flat arrays, laid end to end, into lists of pieces with BLOCK elements together; the last has the rest."""
    pieces: list[Array] = []
    room = BLOCK
    for flat in flats:
        start = 0
        while start < len(flat):
            piece = flat[start : start + room]
            pieces.append(piece)
            start, room = start + len(piece), room - len(piece)
            if not room:
                yield pieces
                pieces, room = [], BLOCK
    if pieces:
        yield pieces


def _add_block(noise: Array, pieces: list[Array], buffer: Array, factor: float) -> None:
    """Set each piece to itself times the factor, plus its part of the noise, computed in float64."""
    start = 0
    for piece in pieces:  # a pass for each step: numpy's conversions within an operation take twice as long
        values = buffer[: len(piece)]
        np.copyto(values, piece)
        if factor != 1.0:
            np.multiply(values, factor, out=values)  # seven times faster than dividing
        np.add(values, noise[start : start + len(piece)], out=values)
        np.copyto(piece, values, casting="same_kind")
        start += len(piece)


def _add_cuda(tensor: Tensor, standard_deviation: float, divisor: float, key: np.random.SeedSequence) -> None:
    generator = torch.Generator(tensor.device)
    generator.manual_seed(int(key.generate_state(1, np.uint64)[0] >> np.uint64(1)))
    draws = _DRAWS_IN_FLOAT64 if tensor.dtype == torch.float64 else 1
    flat = tensor.view(-1) if tensor.is_contiguous() else tensor.reshape(-1)
    for start in range(0, flat.numel(), _CUDA_CHUNK):
        chunk = flat[start : start + _CUDA_CHUNK]
        normal = torch.zeros(chunk.numel(), dtype=torch.float64, device=tensor.device)
        for _ in range(draws):
            normal += torch.randn(normal.shape, dtype=torch.float64, device=tensor.device, generator=generator)
        chunk.copy_(normal.mul_(standard_deviation / math.sqrt(draws)).add_(chunk).div_(divisor))
    if flat.data_ptr() != tensor.data_ptr():
        tensor.copy_(flat.view(tensor.shape))
