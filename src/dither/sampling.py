"""Sampling: Poisson batches, and the examples at their indices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.utils.data import TensorDataset, default_collate

from dither.errors import BatchSizeError, ConfigurationError, EmptyDatasetError
from dither.noise import _BATCH, check_seed, sequence

CollateFunction = Callable[[list[Any]], Any]


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
