"""Noisy class means: what one example can move, what the ledger counts, and that nothing is released twice."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import dither
from dither.accounting import CLASS_MEANS, Event, Ledger, noise_multiplier_for
from dither.errors import BudgetError, ConfigurationError, LabelError, LedgerError, RunFolderError
from dither.release.class_means import ClassMeans, _sums, release_class_means
from dither.release.class_mixtures import ClassMixtures
from dither.report.checking import faults


def _data(n: int = 40, classes: int = 4) -> TensorDataset:
    return TensorDataset(torch.randn(n, 1, 3, 3), torch.arange(n) % classes)


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e6, math.inf, math.nan])
def test_one_example_moves_the_sums_by_at_most_the_clip_norm(size):
    data, every = _data(), torch.arange(40).numpy()
    data.tensors[0][7] *= size
    with_it, counts = _sums(data, every, 4, 2.0, -1.0, None)
    without, fewer = _sums(data, every[every != 7], 4, 2.0, -1.0, None)
    assert (with_it - without).norm() <= 2.0 * (1 + 1e-12)
    assert (counts - fewer).norm() <= 1.0
    assert without.isfinite().all() and with_it.isfinite().all()


def test_the_means_are_those_of_the_classes_when_the_noise_is_small():
    data = _data(400)
    means = release_class_means(data, num_classes=4, noise_multiplier=1e-6, clip_norm=100.0)
    expected = torch.stack([data.tensors[0][data.tensors[1] == label].mean(0) for label in range(4)])
    torch.testing.assert_close(means.images, expected, rtol=1e-3, atol=1e-4)
    assert means.labels.tolist() == [0, 1, 2, 3]


def test_the_noise_has_the_stated_deviation():
    data = TensorDataset(torch.full((10, 1, 40, 40), -1.0), torch.zeros(10, dtype=torch.int64))
    means = release_class_means(
        data, num_classes=2, noise_multiplier=3.0, clip_norm=0.5, draws=20, centre=-1.0, count_weight=None
    )
    deviation = 3.0 * 0.5 / (10 / 2)  # of a sum over the public divisor n / classes
    assert float((means.images + 1.0).std()) == pytest.approx(deviation, rel=0.02)  # 64,000 numbers


def test_released_counts_divide_and_are_paid_for():
    data = TensorDataset(torch.ones(1000, 1, 2, 2), (torch.arange(1000) >= 900).long())
    means = release_class_means(data, num_classes=2, noise_multiplier=0.01, clip_norm=10.0, count_weight=2.0)
    torch.testing.assert_close(means.images, torch.ones(2, 1, 2, 2), rtol=0.05, atol=0)
    assert means.events == (Event(1.0, 0.01, 1, CLASS_MEANS),)


@pytest.mark.parametrize(
    "arguments",
    [{"num_classes": 0}, {"draws": 0}, {"sample_rate": 0.0}, {"sample_rate": 1.5}, {"clip_norm": math.inf}],
)
def test_bad_arguments_are_refused(arguments):
    with pytest.raises(ConfigurationError):
        release_class_means(_data(), **({"num_classes": 4, "noise_multiplier": 1.0, "clip_norm": 1.0} | arguments))


def test_a_label_outside_the_public_set_is_refused():
    with pytest.raises(LabelError):
        release_class_means(_data(), num_classes=3, noise_multiplier=1.0, clip_norm=1.0)


def test_a_release_is_kept_and_never_written_over(tmp_path):
    means = release_class_means(_data(), num_classes=4, noise_multiplier=2.0, clip_norm=1.0, draws=3, sample_rate=0.5)
    means.save(tmp_path / "means")
    kept = ClassMeans.load(tmp_path / "means")
    assert torch.equal(kept.images, means.images) and kept.events == means.events and kept.private
    with pytest.raises(LedgerError):
        means.save(tmp_path / "means")
    with pytest.raises(RunFolderError):
        ClassMixtures.load(tmp_path / "means")
    (tmp_path / "means").write_bytes(b"no longer")
    with pytest.raises(RunFolderError):
        ClassMeans.load(tmp_path / "means")


def _training(model, prior, **options):
    return dither.PrivateTraining(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        TensorDataset(torch.randn(50, 3)),
        lambda model, batch: model(batch[0]).square().mean(1),
        expected_batch_size=10,
        steps=4,
        delta=1e-4,
        prior=prior,
        **options,
    )


def test_the_whole_run_meets_epsilon_with_what_was_released_before():
    prior = (Event(1.0, 4.0, 1, CLASS_MEANS),)
    training = _training(nn.Linear(3, 2), prior, epsilon=2.0)
    assert training.epsilon() == pytest.approx(Ledger(prior).epsilon(1e-4)) and training.index == 0
    for step in training:
        assert Ledger(prior).epsilon(1e-4) < step.epsilon <= 2.0
    assert training.epsilon() <= 2.0
    alone = noise_multiplier_for(2.0, 1e-4, 0.2, 4)
    assert training.noise_multiplier > alone  # the gradients get what is left
    assert [event["release"] for event in training.certificate()["ledger"]] == ["class means", "gradients"]


def test_a_resumed_run_still_counts_the_release(tmp_path):
    prior = (Event(1.0, 4.0, 1, CLASS_MEANS),)
    training = _training(nn.Linear(3, 2), prior, epsilon=2.0)
    training.step()
    training.save(tmp_path)
    model = nn.Linear(3, 2)
    resumed = dither.PrivateTraining.resume(
        tmp_path,
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        TensorDataset(torch.randn(50, 3)),
        lambda model, batch: model(batch[0]).square().mean(1),
    )
    assert resumed.ledger.events[0] == prior[0] and resumed.index == 1
    assert resumed.epsilon() == pytest.approx(training.epsilon())


def test_a_release_that_spends_the_budget_is_refused():
    with pytest.raises(BudgetError):
        _training(nn.Linear(3, 2), (Event(1.0, 0.5, 1, CLASS_MEANS),), epsilon=1.0)
    with pytest.raises(ConfigurationError):
        _training(nn.Linear(3, 2), (Event(0.2, 1.0, 3),), epsilon=8.0)


@pytest.mark.parametrize("seed", [None, 1])
def test_a_release_with_a_seed_makes_the_run_not_private(seed, tmp_path):
    released = release_class_means(_data(), num_classes=4, noise_multiplier=4.0, clip_norm=1.0, seed=seed)
    released.save(tmp_path / "means")
    training = _training(nn.Linear(3, 2), ClassMeans.load(tmp_path / "means").events, noise_multiplier=4.0)
    certificate = training.certificate()
    assert certificate["private"] is (seed is None) and len(faults(certificate)) == (seed is not None)
    if seed is not None:
        assert "class means were released with a seed" in certificate["reasons"][0]
        assert "predictable" in faults({**certificate, "private": True, "reasons": []})[0]
