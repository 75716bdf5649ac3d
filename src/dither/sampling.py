"""Sampling: Poisson batches, and the micro-batches that a logical batch is computed in."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import TensorDataset, default_collate

from dither.errors import BatchSizeError, ConfigurationError, EmptyDatasetError
from dither.noise import _BATCH, check_seed, sequence

CollateFunction = Callable[[list[Any]], Any]

_FIRST = 4  # examples in the first micro-batch of "auto"
_LARGEST = {"cuda": 256}  # on other devices 64: beyond it a CPU's cache loses more than the GEMMs win
_SEEDED = 32  # "auto" under a seed, where splitting by measured memory would change the rounding
_REFUSALS = 3
_SHARE = 0.5  # of the free memory that a micro-batch may take


class PoissonSampler:
    """Draws logical batches: each example is in each batch independently with probability `sample_rate`.

    The privacy amplification of sampling holds for this and for no shuffled or fixed-size batch (Zhu and Wang 2019;
    Mironov, Talwar and Zhang 2019, section 3.3; add or remove one). The batch size is random, and may be zero.

    Args:
        dataset_size: number of examples, n.
        expected_batch_size: sample_rate * n; at most n.
        seed: None for the operating system's entropy; an integer makes batches a function of (seed, step).

    Raises:
        EmptyDatasetError: the dataset has no examples.
        BatchSizeError: expected_batch_size is not in (0, n].
    """

    def __init__(self, dataset_size: int, expected_batch_size: float, *, seed: int | None = None) -> None:
        if dataset_size < 1:
            raise EmptyDatasetError("The dataset has no examples.", fix="pass a dataset with at least one example")
        if not 0 < expected_batch_size <= dataset_size:
            raise BatchSizeError(
                f"expected_batch_size must be above 0 and at most the dataset's {dataset_size} examples; "
                f"it is {expected_batch_size}.",
                fix="a few hundred to a few thousand is usual; larger batches give a better signal-to-noise ratio",
            )
        check_seed(seed)
        self.dataset_size = dataset_size
        self.expected_batch_size = float(expected_batch_size)
        self._seed = seed

    @property
    def sample_rate(self) -> float:
        """Probability that a given example is in a given batch: expected_batch_size / dataset_size."""
        return self.expected_batch_size / self.dataset_size

    def draw(self, step: int = 0) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Indices of one logical batch, ascending; possibly none.

        Args:
            step: index of the logical batch; matters only under a seed.
        """
        generator = np.random.Generator(np.random.PCG64DXSM(sequence(self._seed, step, _BATCH)))
        return np.flatnonzero(generator.random(self.dataset_size) < self.sample_rate).astype(np.int64)


class MicrobatchSize:
    """How many examples to compute at once: performance only, the mechanism does not know it.

    A number is kept. "auto" starts at 4 examples and doubles while the memory that the last micro-batch added to the
    process's peak, taken twice, fits in half of what is free; at most 256 on CUDA, 64 elsewhere. It stops growing at
    the third micro-batch for which this does not hold. Nothing is computed only to measure it; while it grows, the
    system's record of the peak (VmHWM on Linux, torch's on CUDA) is reset. Under a seed "auto" is 32, so that a
    resumed run rounds alike.

    Args:
        size: a number of examples, or "auto".
        device: where the model is.
        seeded: whether the run has a seed.

    Raises:
        ConfigurationError: size is neither "auto" nor an integer of at least 1.
    """

    def __init__(self, size: int | str, device: torch.device, *, seeded: bool = False) -> None:
        valid = size == "auto" or (isinstance(size, int) and not isinstance(size, bool) and size >= 1)
        if not valid:
            raise ConfigurationError(
                f"microbatch_size must be 'auto' or an integer of at least 1; it is {size!r}.", fix="use 'auto'"
            )
        self._device = device
        self._growing = size == "auto" and not seeded
        self._refusals = 0
        self._largest = _LARGEST.get(device.type, 64)
        self.current = size if isinstance(size, int) else (_SEEDED if seeded else _FIRST)

    def split(self, indices: Sequence[int] | np.ndarray[Any, Any]) -> Iterator[np.ndarray[Any, Any]]:
        """Cut a logical batch into micro-batches; the size may grow between them."""
        rest = np.asarray(indices)
        while len(rest):
            size = self.current
            before = _memory(self._device) if self._growing and len(rest) >= size else None
            yield rest[:size]
            rest = rest[size:]
            if before is not None:
                self._grow(before)

    def _grow(self, before: tuple[float, float]) -> None:
        used, free = before
        peak = _peak(self._device)
        if 2.0 * max(peak - used, 0.0) <= _SHARE * free:
            self.current = min(2 * self.current, self._largest)
        else:
            self._refusals += 1  # the first micro-batches also pay for buffers that stay
        self._growing = self.current < self._largest and self._refusals < _REFUSALS


def check_dataset(dataset: Any) -> int:
    """The number of examples of a dataset that can be indexed.

    Raises:
        ConfigurationError: it has no length or cannot be indexed.
        EmptyDatasetError: it has no examples.
    """
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise ConfigurationError(
            f"The dataset, a {type(dataset).__name__}, needs __len__ and __getitem__: Poisson sampling draws by index.",
            fix="pass a map-style dataset; not an iterable one, and not a DataLoader",
        )
    size = len(dataset)
    if size < 1:
        raise EmptyDatasetError("The dataset has no examples.", fix="pass a dataset with at least one example")
    return size


def load_batch(dataset: Any, indices: np.ndarray[Any, Any], collate_fn: CollateFunction | None = None) -> Any:
    """The examples at these indices as one batch.

    Args:
        dataset: map-style; a `TensorDataset` without collate_fn is indexed once instead of example by example.
        indices: (b,), b at least 1.
        collate_fn: list of examples to batch; torch's `default_collate` if None.
    """
    if collate_fn is None and type(dataset) is TensorDataset:
        rows = torch.from_numpy(np.ascontiguousarray(indices))
        return [tensor[rows.to(tensor.device)] for tensor in dataset.tensors]
    if hasattr(dataset, "__getitems__"):
        examples = dataset.__getitems__(indices.tolist())
    else:
        examples = [dataset[index] for index in indices.tolist()]
    return (default_collate if collate_fn is None else collate_fn)(examples)


def _memory(device: torch.device) -> tuple[float, float]:
    """Bytes in use by this process and bytes free."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return float(torch.cuda.memory_allocated(device)), float(torch.cuda.mem_get_info(device)[0] + reserved)
    try:
        with open("/proc/self/clear_refs", "w") as control:
            control.write("5")  # proc(5): resets VmHWM
    except OSError:  # then the peak is the process's whole life's, which errs towards small micro-batches
        pass
    return _status("/proc/self/status", "VmRSS:"), _status("/proc/meminfo", "MemAvailable:") or _sysconf_free()


def _peak(device: torch.device) -> float:
    """Most bytes this process has used at once; since `_memory` where that can be reset."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    return _status("/proc/self/status", "VmHWM:")


def _status(path: str, field: str) -> float:
    """A field in kilobytes of a /proc file, in bytes; zero where there is none."""
    try:
        with open(path) as lines:
            return next((1024.0 * float(line.split()[1]) for line in lines if line.startswith(field)), 0.0)
    except OSError:
        return 0.0


def _sysconf_free() -> float:
    try:
        return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (ValueError, OSError, AttributeError):
        return 0.0
