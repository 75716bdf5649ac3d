"""Noisy Gaussians of each class: what one example can move, what they hold, and what the ledger counts."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from dither.accounting import CLASS_GAUSSIANS, Event
from dither.errors import ConfigurationError, LabelError, LedgerError
from dither.release.class_gaussians import (
    ClassGaussians,
    _class_moments,
    _factors,
    _moments,
    _sums,
    release_class_gaussians,
)
from dither.release.reading import clipped_distances

K, D, CLIP, WEIGHT = 4, 9, 2.0, 1.0


def _data(n: int = 40) -> TensorDataset:
    return TensorDataset(torch.randn(n, 1, 3, 3), torch.arange(n) % K)


def _statistics(data: TensorDataset, middles, directions):
    batches = [clipped_distances(data, np.arange(len(data)), middles, CLIP, None) for _ in range(3)]
    return _sums(batches[0], K, D, WEIGHT), _moments(batches[1], D), _class_moments(batches[2], directions, K)


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e6, math.inf, math.nan])
def test_one_example_moves_each_release_by_at_most_its_sensitivity(size):
    data = _data()
    data.tensors[0][7] *= size
    without = TensorDataset(*(torch.cat([part[:7], part[8:]]) for part in data.tensors))
    middles, directions = torch.randn(K, D).double(), torch.linalg.qr(torch.randn(D, 5).double()).Q
    moved = [
        (a - b).norm() for a, b in zip(*(_statistics(d, middles, directions) for d in (data, without)), strict=True)
    ]
    bounds = [math.hypot(CLIP, WEIGHT), CLIP**2, CLIP**2]
    assert all(distance <= bound * (1 + 1e-12) for distance, bound in zip(moved, bounds, strict=True))
    if size == 1e6:  # clipped: the bounds are met
        torch.testing.assert_close(torch.stack(moved[:2]), torch.tensor(bounds[:2]).double())


def test_drawn_images_have_the_classes_means_and_covariances_when_the_noise_is_small():
    spread = torch.randn(2, D, D) / 3
    labels = torch.arange(4000) % 2
    images = labels[:, None] * 2.0 + (spread[labels] @ torch.randn(4000, D, 1)).squeeze(2)
    data = TensorDataset(images.view(-1, 1, 3, 3), labels)
    found = release_class_gaussians(data, num_classes=2, noise_multiplier=1e-6, rank=D, clip_norm=100.0)
    for label in range(2):
        drawn = found.draw(torch.full((40_000,), label)).flatten(1)
        torch.testing.assert_close(drawn.mean(0), images[labels == label].mean(0), atol=0.05, rtol=0)
        torch.testing.assert_close(drawn.T.cov(), images[labels == label].T.cov(), atol=0.1, rtol=0.1)
    assert found.draw(labels, (-1.0, 1.0)).abs().max() == 1


def test_the_noise_has_the_stated_deviation():
    data = TensorDataset(torch.full((4000, 1, 40, 40), -1.0), torch.zeros(4000, dtype=torch.int64))
    found = release_class_gaussians(data, num_classes=1, noise_multiplier=3.0, rank=2, clip_norm=0.5, centre=-1.0)
    sums = (found.means + 1) * 4000  # the noisy count that divided is within 1% of it
    assert float(sums.std()) == pytest.approx(3.0 * math.hypot(0.5, 0.25), rel=0.1)  # 1,600 numbers


def test_directions_of_noise_alone_are_left_out():
    noise = torch.randn(3, 60, 60).double() * 0.7
    assert int((_factors(noise, torch.full((3,), 0.7).double()) != 0).any(1).sum()) <= 6  # the edge is not sharp
    strong = noise + 100.0 * torch.diag(torch.arange(60) < 5).double()
    kept = (_factors(strong, torch.full((3,), 0.7).double()).square().sum(1) > 90).sum(1)
    assert kept.tolist() == [5, 5, 5]


@pytest.mark.parametrize(
    "arguments", [{"num_classes": 0}, {"rank": 0}, {"rank": 10}, {"clip_norm": 0.0}, {"noise_multiplier": 0.0}]
)
def test_bad_arguments_are_refused(arguments):
    with pytest.raises(ConfigurationError):
        release_class_gaussians(_data(), **({"num_classes": K, "noise_multiplier": 1.0, "rank": 3} | arguments))


def test_large_images_and_labels_outside_the_public_set_are_refused():
    large = TensorDataset(torch.zeros(2, 3, 64, 64), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ConfigurationError, match="12288 entries"):
        release_class_gaussians(large, num_classes=1, noise_multiplier=1.0)
    with pytest.raises(LabelError):
        release_class_gaussians(_data(), num_classes=3, noise_multiplier=1.0, rank=3)


def test_a_release_is_kept_and_never_written_over(tmp_path):
    found = release_class_gaussians(_data(), num_classes=K, noise_multiplier=2.0, rank=3)
    assert found.events == (Event(1.0, 2.0, 3, CLASS_GAUSSIANS),)
    found.save(tmp_path / "gaussians")
    kept = ClassGaussians.load(tmp_path / "gaussians")
    assert torch.equal(kept.factors, found.factors) and kept.events == found.events and kept.private
    with pytest.raises(LedgerError):
        found.save(tmp_path / "gaussians")


def test_a_seed_repeats_the_release_and_is_not_private():
    one, two = (release_class_gaussians(_data(), num_classes=K, noise_multiplier=2.0, rank=3, seed=5) for _ in range(2))
    assert not one.private and one.means.shape == (K, 1, 3, 3) and two.directions.shape == (3, 1, 3, 3)
    data = _data()
    again = [release_class_gaussians(data, num_classes=K, noise_multiplier=2.0, rank=3, seed=5).means for _ in range(2)]
    assert torch.equal(*again)
