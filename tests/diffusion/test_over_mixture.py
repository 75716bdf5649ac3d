"""The mixture's denoiser against the posterior written out, and a network over it under clipping."""

from __future__ import annotations

import pytest
import torch
from denoisers import perturbed
from torch import nn

import dither
from dither.diffusion.dit import dit
from dither.diffusion.loss import DiffusionLoss
from dither.diffusion.over_mixture import OverMixture
from dither.diffusion.process import Process
from dither.diffusion.sampling import sample
from dither.errors import ConfigurationError
from dither.release.class_mixtures import ClassMixtures, release_class_mixtures, release_sizes
from oracle import clipped_sum as oracle_sum
from oracle import per_example_gradients, relative_error

K, M, SIDE = 3, 4, 4
D = SIDE**2


class Nothing(nn.Module):
    """A network of zeros."""

    def __init__(self, side: int = SIDE, classes: int = K) -> None:
        super().__init__()
        self.input_size, self.in_channels, self.num_classes = side, 1, classes
        self.scale = nn.Parameter(torch.zeros(()))

    def forward(self, x, t, y, drop_label=None):
        return x * self.scale


def _mixtures(rank: int) -> ClassMixtures:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    directions, axes = release_sizes(D, rank)
    return ClassMixtures(
        middle=normal(1, SIDE, SIDE),
        directions=torch.linalg.qr(normal(D, D)).Q[:, :directions].T.reshape(directions, 1, SIDE, SIDE),
        weights=normal(K, M).softmax(1),
        centres=normal(K, M, directions),
        axes=torch.linalg.qr(normal(K, M, directions, directions)).Q[..., :axes],
        variances=normal(K, M, axes).square() * (normal(K, M, axes) > 0),
        rest=torch.tensor([0.2, 0.05]),
        events=(),
    )


def _posterior_mean(found: ClassMixtures, x, deviation, classes):
    """Bayes' rule over the components of the classes, with covariances D x D in double precision."""
    basis = found.directions.flatten(1).double()
    scores, means = [], []
    for label in classes:
        for component in range(M):
            axes, variances = found.axes[label, component].double(), found.variances[label, component].double()
            within = found.rest[0].double()
            inner = within * torch.eye(len(basis)) + axes @ torch.diag((variances - within).clamp(min=0)) @ axes.T
            outer = found.rest[1].double() * (torch.eye(D) - basis.T @ basis)
            covariance = basis.T @ inner @ basis + outer
            noisy = covariance + deviation**2 * torch.eye(D)
            centre = found.middle.flatten().double() + found.centres[label, component].double() @ basis
            seen = torch.distributions.MultivariateNormal(centre, noisy)
            scores.append(found.weights[label, component].double().log() + seen.log_prob(x))
            means.append(centre + covariance @ torch.linalg.solve(noisy, x - centre))
    return torch.stack(scores).softmax(0) @ torch.stack(means)


@pytest.mark.parametrize("rank", [D, 7])
@pytest.mark.parametrize("deviation", [0.03, 0.5, 20.0])
def test_the_mixture_denoises_by_bayes_rule(rank, deviation):
    found = _mixtures(rank)
    model = OverMixture(Nothing(), Process(), M, rank)
    model.fill(found)
    labels = torch.arange(6) % K
    x = found.draw(labels) + deviation * torch.randn(6, 1, SIDE, SIDE)
    hidden = torch.tensor([False] * 3 + [True] * 3)
    ours = model.expected(x, torch.full((6,), deviation), labels, hidden).flatten(1)
    for index, label in enumerate(labels.tolist()):
        classes = range(K) if hidden[index] else [label]
        theirs = _posterior_mean(found, x[index].flatten().double(), deviation, classes)
        torch.testing.assert_close(ours[index].double(), theirs, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("prediction", ["epsilon", "v", "sample", "edm", "flow"])
def test_a_network_of_zeros_says_what_the_mixture_expects(prediction):
    process = Process(prediction=prediction)
    model = OverMixture(Nothing(), process, M, D)
    model.fill(_mixtures(D))
    model.double()
    images, labels, t = (
        torch.randn(6, 1, SIDE, SIDE).double(),
        torch.arange(6) % K,
        torch.tensor([1, 5, 100, 500, 900, 999]),
    )
    noise = torch.randn_like(images)
    x_t = process.add_noise(images, noise, t)
    signal, level = (part.double().view(-1, 1, 1, 1) for part in process.signal_and_noise(t))
    clean = model.expected(x_t / signal, (level / signal).flatten(), labels)
    left = (x_t - signal * clean) / level
    torch.testing.assert_close(model(x_t, t, labels), process.target(clean, left, t))


@pytest.mark.parametrize("prediction", ["edm", "flow"])
def test_samples_are_the_mixtures_own_where_the_network_adds_nothing(prediction):
    found = _mixtures(D)
    found.rest.fill_(1e-4)
    process = Process(prediction=prediction)
    model = OverMixture(Nothing(), process, M, D)
    model.fill(found)
    labels = torch.arange(600) % K
    sampler = "euler" if prediction == "flow" else "ddim"
    drawn = sample(model, labels, process=process, sampler=sampler, steps=50, clip=False, seed=0).flatten(1)
    expected = found.draw(torch.arange(9000) % K).flatten(1)
    for label in range(K):
        ours, theirs = drawn[labels == label], expected[torch.arange(9000) % K == label]
        error = (ours.mean(0) - theirs.mean(0)).norm() / theirs.std(0).norm()
        assert error < 0.25  # of two hundred draws: 0.07 is chance, the rest the sampler's steps
        assert ours.std(0).norm() == pytest.approx(float(theirs.std(0).norm()), rel=0.15)


@pytest.mark.parametrize("strategy", ["auto", "hold", "ghost", "two_pass"])
def test_clipped_sums_over_a_mixture_are_exact(strategy):
    classes, side = 5, 8
    labels = torch.arange(60) % classes
    images = torch.randn(60, 1, side, side).clamp(-1, 1)
    data = torch.utils.data.TensorDataset(images, labels)
    found = release_class_mixtures(data, num_classes=classes, noise_multiplier=1.0, components=2, rank=20)
    sized = {"hidden_size": 32, "depth": 1, "num_heads": 2, "patch_size": 4}
    process = Process(prediction="edm", sigma_data=0.25)
    network = dit("DiT-digits", **sized, input_size=side, in_channels=1, num_classes=classes, learn_sigma=False)
    model = OverMixture(perturbed(network), process, 2, 20).double()
    model.fill(found)
    loss = DiffusionLoss(process, 3, 0.3, classes)
    batch = images[:6].double(), labels[:6]
    draws = loss.draw(batch[0])
    truth = per_example_gradients(model, lambda: loss.at(model, *batch, draws))
    ours = dither.clipped_sum(
        model, lambda: loss.at(model, *batch, draws), max_grad_norm=0.5, strategy=strategy, rows_per_example=3
    )
    assert relative_error(ours.gradients, oracle_sum(truth, 0.5)) < 1e-12


def test_weights_files_hold_the_mixture_and_nothing_of_it_is_trained():
    model = OverMixture(Nothing(), Process(), M, D)
    model.fill(_mixtures(D))
    other = OverMixture(Nothing(), Process(), M, D)
    other.load_state_dict(model.state_dict())
    x, t, y = torch.randn(2, 1, SIDE, SIDE), torch.tensor([10, 900]), torch.tensor([0, 2])
    assert torch.equal(model(x, t, y), other(x, t, y))
    assert [name for name, _ in model.named_parameters()] == ["model.scale"]


def test_learned_variances_are_refused():
    with pytest.raises(ConfigurationError):
        OverMixture(Nothing(), Process(learn_sigma=True), M, D)


def test_a_release_of_another_size_is_refused():
    with pytest.raises(ConfigurationError, match="shape"):
        OverMixture(Nothing(), Process(), 1, D).fill(_mixtures(D))
