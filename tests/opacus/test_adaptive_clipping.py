"""Adaptive clipping in ghost mode: one loss per example, clipped at the bound that the batch's norms moved."""

from __future__ import annotations

import opacus.optimizers.optimizer as stock_noise
import opacus.optimizers.optimizer_fast_gradient_clipping as stock_fast_noise
import pytest
import torch
import torch.nn.functional as F
from limits_measure import clipped_sum
from opacus.utils.adaptive_clipping import PrivacyEngineAdaptiveClipping as EarlyEngine
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import dither.opacus
import oracle
from dither import errors

pytestmark = pytest.mark.usefixtures("double_precision")
B = 32


def network() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(3, 2)


def private(engine, criterion=None, **options):
    model, data = network(), TensorDataset(torch.randn(B, 3), torch.randn(B, 2))
    settings = {"noise_multiplier": 0.0, "target_unclipped_quantile": 0.5, "min_clipbound": 0.1, "max_clipbound": 9.0}
    return engine().make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.0),
        criterion=criterion or nn.MSELoss(),
        data_loader=DataLoader(data, batch_size=B),
        max_grad_norm=1.0,
        poisson_sampling=False,
        grad_sample_mode="ghost",
        **(settings | options),
    )


def scaled(sums: dict[str, Tensor], bound: float) -> dict[str, Tensor]:
    return {name: gradient * bound for name, gradient in sums.items()}


def step(engine, target: Tensor, **options) -> tuple[dict[str, Tensor], float]:
    """The clipped sum of one batch, and its bound."""
    model, optimizer, criterion, _ = private(engine, **options)
    criterion(model(torch.arange(3.0 * B).view(B, 3) / B), target).backward()
    optimizer.step()
    return {n: p.summed_grad for n, p in model._module.named_parameters()}, optimizer.max_grad_norm


def test_the_sum_is_clipped_at_the_moved_bound():
    target = torch.linspace(-2, 2, 2 * B).view(B, 2)
    found, bound = step(dither.opacus.PrivacyEngineAdaptiveClipping, target)
    assert bound != 1.0
    model, x = network(), torch.arange(3.0 * B).view(B, 3) / B
    truth = oracle.per_example_gradients(model, lambda: F.mse_loss(model(x), target, reduction="none").mean(1))
    whole = scaled(clipped_sum({n: g / bound for n, g in truth.items()}), bound)
    assert oracle.relative_error(found, whole) <= 1e-5


@pytest.mark.usefixtures("installed")
def test_one_example_moves_the_sum_by_at_most_the_bound():
    target = torch.linspace(-2, 2, 2 * B).view(B, 2)
    other = target.clone()
    other[0] = 1e4
    options = {"min_clipbound": 1.0, "max_clipbound": 1.0}
    (one, _), (two, _) = (step(EarlyEngine, t, **options) for t in (target, other))
    moved = sum(float((one[n] - two[n]).square().sum()) for n in one) ** 0.5
    assert moved <= 2.0 + 1e-6  # one contribution out, another in


@pytest.mark.usefixtures("installed")
def test_losses_that_are_not_per_example_are_refused():
    model, _, criterion, _ = private(EarlyEngine, lambda output, target: (output - target).square().mean())
    with pytest.raises(errors.LossShapeError):
        criterion(model(torch.randn(B, 3)), torch.randn(B, 2)).backward()


@pytest.mark.usefixtures("installed")
def test_noise_is_for_the_largest_bound_of_virtual_steps(monkeypatch):
    drawn = []

    def watched(std, reference, **options):
        drawn.append(float(std))
        return torch.zeros_like(reference)

    monkeypatch.setattr(stock_noise, "_generate_noise", watched)
    monkeypatch.setattr(stock_fast_noise, "_generate_noise", watched)
    model, optimizer, criterion, _ = private(EarlyEngine, noise_multiplier=1.0, clipbound_learning_rate=3.0)
    bounds = []
    for scale, last in ((10.0, False), (1e-4, True)):
        optimizer.signal_skip_step(do_skip=not last)
        optimizer.zero_grad()
        x = torch.randn(B, 3)
        criterion(model(x), model(x).detach() + scale).backward()
        bounds.append(optimizer.max_grad_norm)
        optimizer.step()
    assert bounds[0] > bounds[1] and optimizer.noise_multiplier == 1.0
    multiplier = (1 - (2 * B / 20) ** -2) ** -0.5
    assert drawn and all(std == pytest.approx(multiplier * max(bounds)) for std in drawn)
