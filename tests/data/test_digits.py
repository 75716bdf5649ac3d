"""The built-in digits."""

from __future__ import annotations

import torch

from dither.data import digits


def test_digits():
    train, test = digits()
    for part, count in ((train, 1437), (test, 360)):
        images, labels = part.tensors
        assert images.shape == (count, 1, 8, 8) and images.dtype == torch.float32
        assert labels.shape == (count,) and labels.dtype == torch.int64
        assert images.min() == -1 and images.max() == 1
        assert labels.unique().tolist() == list(range(10))


def test_split_is_fixed_and_disjoint():
    (first, held_out), (again, _) = digits(), digits()
    assert torch.equal(first.tensors[0], again.tensors[0])
    seen = {tuple(image.flatten().tolist()) for image in first.tensors[0]}
    assert not any(tuple(image.flatten().tolist()) in seen for image in held_out.tensors[0])
