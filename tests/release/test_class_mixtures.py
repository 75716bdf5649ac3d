"""Noisy mixtures of each class: what one example can move, what they hold, and what the ledger counts."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils.data import TensorDataset

from dither.accounting import CLASS_MIXTURES, Event
from dither.errors import ConfigurationError, LabelError, LedgerError
from dither.release import class_mixtures
from dither.release.class_mixtures import (
    ClassMixtures,
    release_class_mixtures,
    release_sizes,
)
from dither.release.covariances import group_moments
from dither.release.frequencies import low_frequencies
from dither.release.points import clipped, group_sums

K = 4


def _data(n: int = 40) -> TensorDataset:
    return TensorDataset(torch.randn(n, 1, 3, 3), torch.arange(n) % K)


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e6])
def test_one_example_moves_each_sum_by_at_most_its_sensitivity(size):
    points, groups, left = torch.randn(40, 9).double(), torch.arange(40) % K, torch.rand(40).double()
    points[7] *= size
    left[7] *= size
    rest = torch.arange(40) != 7
    moved, bounds = [], []
    for statistic, bound in (
        (lambda *of: clipped(of[0], 2.0).sum(0), 2.0),
        (lambda *of: clipped(of[0], 2.0).T @ clipped(of[0], 2.0), 4.0),
        (lambda *of: group_sums(of[0], of[1], K, 2.0), 2.0 * math.hypot(1, 0.5)),
        (lambda *of: group_moments(of[0], of[2], of[1], K, 2.0), 4.0 * math.hypot(1, 0.02 * 4)),
    ):
        all_of_them, without = statistic(points, groups, left), statistic(points[rest], groups[rest], left[rest])
        moved.append(float((all_of_them - without).norm()))
        bounds.append(bound)
    assert all(distance <= bound * (1 + 1e-12) for distance, bound in zip(moved, bounds, strict=True))
    if size == 1e6:  # clipped: the bounds are met
        assert moved == pytest.approx(bounds)


def test_every_sum_gets_noise_and_together_they_cost_one_mechanism(monkeypatch):
    drawn = []

    class Watched(class_mixtures.SharedNoise):
        def added(self, sums, sensitivity, share):
            before = sums.clone()
            after = super().added(sums, sensitivity, share)
            drawn.append((share, float((after - before).std()) / sensitivity * math.sqrt(share)))
            return after

    monkeypatch.setattr(class_mixtures, "SharedNoise", Watched)
    data = TensorDataset(torch.randn(400, 1, 28, 28).clamp(-1, 1), torch.arange(400) % 10)
    release_class_mixtures(data, num_classes=10, noise_multiplier=3.0, components=2, rank=30)
    assert len(drawn) == 7 and sum(share for share, _ in drawn) == pytest.approx(1.0)
    # each part has at least 200 numbers, whose deviation is known to 15% with all but certainty
    assert all(deviation == pytest.approx(3.0, rel=0.25) for _, deviation in drawn)


@pytest.mark.parametrize("size", [0.1, 1.0, 1e3])
def test_one_example_moves_no_sum_by_more_than_the_noise_is_for(size, monkeypatch):
    """Two runs on neighbours, the second with what the first released: only the sums before the noise differ."""
    first, moved = [], []

    class First(class_mixtures.SharedNoise):
        def added(self, sums, sensitivity, share):
            before = sums.clone()
            first.append((before, super().added(sums, sensitivity, share).clone()))
            return sums

    class Second(class_mixtures.SharedNoise):
        def added(self, sums, sensitivity, share):
            before, released = first[len(moved)]
            moved.append(float((sums - before).norm()) / sensitivity)
            return released

    images, labels = torch.randn(300, 1, 28, 28).clamp(-1, 1), torch.arange(300) % 3
    images[7] *= size
    without = images.clone()
    without[7] = math.nan  # left out, while the number of examples stays as it is: it is public
    for noise, of in ((First, images), (Second, without)):
        monkeypatch.setattr(class_mixtures, "SharedNoise", noise)
        data = TensorDataset(of, labels)
        # All 200 directions: along fewer, a large example may well be a small one.
        release_class_mixtures(data, num_classes=3, noise_multiplier=0.5, components=4, rank=200)
    assert len(moved) == len(first) == 7 and max(moved) <= 1 + 1e-9
    if size == 1e3:
        assert min(moved) > 0.9  # clipped, all of them


def test_parts_beyond_the_whole_are_refused():
    noise = class_mixtures.SharedNoise(1.0, None)
    noise.added(torch.zeros(3), 1.0, 0.7)
    with pytest.raises(LedgerError):
        noise.added(torch.zeros(3), 1.0, 0.4)


@pytest.mark.parametrize("rank", [198, 199, 200, 300])
def test_every_rank_of_a_coloured_image_fits(rank):
    data = TensorDataset(torch.randn(20, 3, 12, 12), torch.arange(20) % 2)
    found = release_class_mixtures(data, num_classes=2, noise_multiplier=1.0, rank=rank)
    assert found.directions.shape[0] == release_sizes(3 * 144, rank)[0]


def test_components_far_apart_are_found_when_the_noise_is_small():
    generator = torch.Generator().manual_seed(0)
    corners = torch.tensor([[-1.0, -1.0], [1.0, 1.0], [-1.0, 1.0], [1.0, -1.0]])
    which = torch.arange(4000) % 4
    spread = torch.tensor([0.2, 0.02])
    images = corners[which] + spread * torch.randn(4000, 2, generator=generator)
    data = TensorDataset(images.view(-1, 1, 1, 2), which // 2)
    found = release_class_mixtures(data, num_classes=2, noise_multiplier=1e-6, components=2, rank=2, clip_norm=4.0)
    for label in range(2):
        points = found.centres[label] @ found.directions.flatten(1) + found.middle.flatten()
        assert torch.cdist(corners[2 * label : 2 * label + 2], points).min(1).values.max() < 0.05
    torch.testing.assert_close(found.weights, torch.full((2, 2), 0.5), atol=0.01, rtol=0)
    torch.testing.assert_close(
        found.variances.sqrt().sort().values[..., -1], torch.full((2, 2), 0.2), atol=0.02, rtol=0
    )
    drawn = found.draw(torch.zeros(2000, dtype=torch.int64)).flatten(1)
    torch.testing.assert_close(drawn.mean(0), torch.zeros(2), atol=0.15, rtol=0)
    assert found.draw(torch.zeros(50, dtype=torch.int64), (-0.5, 0.5)).abs().max() <= 0.5


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (3, 20, 30), (5,), (400,), (2, 3, 3)])
def test_low_frequencies_are_orthonormal_and_the_first_is_flat(shape):
    waves = low_frequencies(shape, 200)
    torch.testing.assert_close(waves.T @ waves, torch.eye(waves.shape[1]).double())
    assert waves.shape[0] == math.prod(shape) and waves.shape[1] <= 200 + shape[0]
    if math.prod(shape) > 200:
        first = waves[:, 0].view(shape)[0] if len(shape) > 1 else waves[:, 0]
        torch.testing.assert_close(first, torch.full_like(first, 1 / math.sqrt(first.numel())))


def test_examples_that_are_not_finite_are_left_out_and_huge_ones_move_little():
    data = _data(400)
    data.tensors[0][7], data.tensors[0][8] = math.nan, 1e30
    found = release_class_mixtures(data, num_classes=K, noise_multiplier=1e-3, components=2, rank=9)
    assert all(tensor.isfinite().all() for tensor in found.tensors().values())
    assert found.middle.abs().max() < 1


def test_with_much_noise_everything_stays_finite_and_variances_positive():
    found = release_class_mixtures(_data(), num_classes=K, noise_multiplier=300.0, components=5, rank=9)
    assert all(tensor.isfinite().all() for tensor in found.tensors().values())
    assert (found.weights > 0).all() and (found.variances >= 0).all() and (found.rest > 0).all()


@pytest.mark.parametrize(
    "arguments", [{"num_classes": 0}, {"rank": 0}, {"components": 0}, {"clip_norm": 0.0}, {"noise_multiplier": 0.0}]
)
def test_bad_arguments_are_refused(arguments):
    with pytest.raises(ConfigurationError):
        release_class_mixtures(_data(), **({"num_classes": K, "noise_multiplier": 1.0, "rank": 3} | arguments))


def test_labels_outside_the_public_set_are_refused():
    with pytest.raises(LabelError):
        release_class_mixtures(_data(), num_classes=3, noise_multiplier=1.0, rank=3)


def test_a_release_is_kept_and_never_written_over(tmp_path):
    found = release_class_mixtures(_data(), num_classes=K, noise_multiplier=2.0, components=3, rank=60)
    assert found.events == (Event(1.0, 2.0, 1, CLASS_MIXTURES),) and found.private
    assert found.axes.shape == (K, 3, *release_sizes(9, 60)) and found.directions.shape == (9, 1, 3, 3)
    found.save(tmp_path / "mixtures")
    kept = ClassMixtures.load(tmp_path / "mixtures")
    assert all(torch.equal(tensor, found.tensors()[name]) for name, tensor in kept.tensors().items())
    assert kept.events == found.events and kept.private
    with pytest.raises(LedgerError):
        found.save(tmp_path / "mixtures")


def test_a_seed_repeats_the_release_and_is_not_private():
    data = _data()
    one, two = (
        release_class_mixtures(data, num_classes=K, noise_multiplier=2.0, components=2, rank=3, seed=5)
        for _ in range(2)
    )
    assert not one.private
    assert all(torch.equal(tensor, two.tensors()[name]) for name, tensor in one.tensors().items())
