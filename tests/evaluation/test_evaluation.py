"""Scores that must come out right: real digits as samples, noise as samples, copies of training images."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from dither import evaluation
from dither.data import digits
from dither.errors import BudgetError, ConfigurationError
from dither.evaluation.private_score import private_score


@pytest.fixture(scope="module")
def real():
    return tuple(part.tensors for part in digits())


@pytest.mark.parametrize("name", evaluation.CLASSIFIERS)
def test_real_digits_teach_and_noise_does_not(real, name):
    (images, labels), (test, test_labels) = real
    taught = evaluation.score(name, images, labels, test, test_labels, 10)
    assert taught.accuracy > 0.93 and len(taught.by_class) == 10 and min(taught.by_class) > 0.8
    guessed = evaluation.score(name, torch.rand_like(images) * 2 - 1, labels, test, test_labels, 10)
    assert guessed.accuracy < 0.5


@pytest.mark.parametrize("name", evaluation.CLASSIFIERS)
def test_one_class_alone_is_what_is_said(name):
    labels, test_labels = torch.zeros(20, dtype=torch.int64), torch.tensor([0, 0, 0, 1])
    score = evaluation.score(name, torch.randn(20, 1, 8, 8), labels, torch.randn(4, 1, 8, 8), test_labels, 2)
    assert score == evaluation.Score(0.75, (1.0, 0.0))


def test_frechet_distance_of_known_gaussians():
    x = torch.randn(200_000, 2, dtype=torch.float64)
    y = x * torch.tensor([2.0, 1.0]) + torch.tensor([3.0, 0.0])
    # |mean|^2 + (2 - 1)^2 of the first coordinate's deviation
    assert evaluation.frechet_distance(y, x) == pytest.approx(9.0 + 1.0, rel=0.02)
    assert evaluation.frechet_distance(x, x) == pytest.approx(0.0, abs=1e-6)


def test_frechet_distance_survives_fewer_images_than_features():
    few = torch.randn(5, 30)
    assert math.isfinite(evaluation.frechet_distance(few, torch.randn(6, 30)))


def test_kernel_distance_tells_alike_from_different():
    same, error = evaluation.kernel_distance(torch.randn(900, 8), torch.randn(900, 8))
    assert abs(same) < 6 * error + 0.02
    other, error = evaluation.kernel_distance(torch.randn(900, 8) + 1.0, torch.randn(900, 8))
    assert other > 20 * error


def test_precision_and_recall_tell_copies_from_outliers():
    real = torch.randn(400, 4)
    assert evaluation.precision_recall(real, real) == (1.0, 1.0)
    precision, recall = evaluation.precision_recall(real[:20].repeat(20, 1), real)
    assert precision == 1.0 and recall < 0.5  # one mode: what is drawn is real, most of the real is not drawn
    assert evaluation.precision_recall(real + 100.0, real) == (0.0, 0.0)


def test_copies_of_training_images_are_found(real):
    (images, _), (test, _) = real
    generated = torch.rand(30, 1, 8, 8) * 2 - 1
    generated[4], generated[9] = images[100], images[7] + 1e-3
    found = evaluation.nearest(generated, images, test)
    assert set(found.suspicious.tolist()) == {4, 9}
    assert found.indices[4] == 100 and found.indices[9] == 7
    with pytest.raises(ConfigurationError):
        evaluation.nearest(generated[:0], images, test)


def test_a_private_score_has_the_noise_that_it_states():
    scores = [private_score(300, 360, 1.0, 1e-5) for _ in range(400)]
    drawn = np.array([score.accuracy for score in scores]) * 360
    assert drawn.std() == pytest.approx(scores[0].noise_multiplier, rel=0.2)
    assert abs(drawn.mean() - 300) < 5 * scores[0].noise_multiplier / 20
    assert scores[0].epsilon == pytest.approx(1.0, rel=1e-3)


def test_private_scores_of_the_same_images_add_up():
    first = private_score(300, 360, 1.0, 1e-5)
    second = private_score(300, 360, 1.0, 1e-5, [first.noise_multiplier])
    assert 1.2 < second.epsilon < 2.0
    with pytest.raises((BudgetError, ConfigurationError)):
        private_score(300, 360, 0.0, 1e-5)


def test_a_fixed_number_of_passes_is_no_warning(real, recwarn):
    (images, labels), (test, test_labels) = real
    evaluation.score("MLP", images[:200], labels[:200], test, test_labels, 10)
    assert not [str(one.message) for one in recwarn if "converge" in str(one.message)]
