"""The 8 x 8 handwritten digits that ship inside scikit-learn: a data set without a download."""

from __future__ import annotations

import torch
from torch.utils.data import TensorDataset

# Public constants: the pixel range the data set documents, and a split that no pixel decides.
PIXEL_MAX = 16.0
HELD_OUT = 5  # every fifth of the permutation
SPLIT_SEED = 20230401
CLASS_NAMES = tuple(str(digit) for digit in range(10))


def digits() -> tuple[TensorDataset, TensorDataset]:
    """Return the digits, split into training and held-out images.

    Returns:
        (train, test), each a `TensorDataset` of images (N, 1, 8, 8) float32 in [-1, 1] and labels (N,)
        int64 in 0..9; N is 1437 and 360.

    Source: scikit-learn's `load_digits` (UCI optical recognition of handwritten digits, test part).
    """
    from sklearn.datasets import load_digits

    raw = load_digits()
    images = torch.as_tensor(raw.data, dtype=torch.float32).view(-1, 1, 8, 8) / (PIXEL_MAX / 2) - 1
    labels = torch.as_tensor(raw.target, dtype=torch.int64)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SPLIT_SEED))
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    held_out[order[: -(-len(labels) // HELD_OUT)]] = True
    return (
        TensorDataset(images[~held_out], labels[~held_out]),
        TensorDataset(images[held_out], labels[held_out]),
    )
