"""A DiT under flash clipping: norms, clipped sums, a training loop. The document's third suite."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from opacus.grad_sample import GradSampleModuleFastGradientClipping
from opacus.optimizers import DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping
from seed_cases import (
    clipped_sum,
    dit,
    dit_batch,
    dit_losses,
    median_norm,
    named,
    one_at_a_time,
    parameter_error,
    per_example_mse,
    within,
)

import dither.opacus
import oracle

pytestmark = pytest.mark.usefixtures("installed")

STRATEGIES = ("auto", "hold", "ghost", "tile", "two_pass")


def relative(ours, truth):
    """The worst entry's relative error."""
    return float(((ours.double() - truth).abs() / truth.abs()).max())


def private(model, bound, *, expected_batch_size, noise_multiplier=0.0, lr=0.1, generator=None, **options):
    """Wrapped module, optimizer and loss."""
    wrapped = GradSampleModuleFastGradientClipping(model, max_grad_norm=bound, **options)
    assert isinstance(wrapped, dither.opacus.GradSampleModuleFastGradientClipping)
    optimizer = DPOptimizerFastGradientClipping(
        torch.optim.SGD(wrapped.parameters(), lr=lr),
        noise_multiplier=noise_multiplier,
        max_grad_norm=bound,
        expected_batch_size=expected_batch_size,
        generator=generator,
    )

    def criterion(prediction, target):
        return per_example_mse(prediction, target)

    criterion.reduction = "mean"
    return wrapped, optimizer, DPLossFastGradientClipping(wrapped, optimizer, criterion, "mean")


def test_basic_flash_clipping():
    """Norms and clip factors after an ordinary backward pass, in every strategy."""
    images, timesteps, labels, target = batch = dit_batch(5)
    truth = one_at_a_time(dit(), dit_losses, *batch)
    norms, bound = oracle.norms(truth), median_norm(truth)
    for strategy in STRATEGIES:
        wrapped = GradSampleModuleFastGradientClipping(dit(), max_grad_norm=bound, strategy=strategy)
        F.mse_loss(wrapped(images, timesteps, labels), target).backward()
        within(f"{strategy}: norms", relative(wrapped.get_norm_sample(), norms))
        within(f"{strategy}: norms at once", relative(wrapped.per_sample_gradient_norms, norms))
        within(f"{strategy}: factors", relative(wrapped.get_clipping_coef(), (bound / (norms + 1e-6)).clamp(max=1.0)))
        mean = {name: g.mean(0) for name, g in truth.items()}
        within(f"{strategy}: gradient", oracle.relative_error(named(wrapped, "grad"), mean))


def test_loss_wrapper_integration():
    """`backward` of the wrapped loss leaves the clipped sum in `.grad`, in every strategy."""
    images, timesteps, labels, target = batch = dit_batch(5)
    truth = one_at_a_time(dit(), dit_losses, *batch)
    value = float(dit_losses(dit().double(), images.double(), timesteps, labels, target.double()).detach().mean())
    for bound in (median_norm(truth), 1e3 * median_norm(truth)):
        expected = clipped_sum(truth, bound)
        for strategy in STRATEGIES:
            wrapped, _, loss_fn = private(dit(), bound, expected_batch_size=5, strategy=strategy)
            loss = loss_fn(wrapped(images, timesteps, labels), target)
            loss.backward()
            ours = named(wrapped, "grad")
            within(f"{strategy}: clipped sum", oracle.relative_error(ours, expected))
            within(f"{strategy}: worst parameter", parameter_error(ours, expected))
            within(f"{strategy}: loss", abs(loss.item() - value) / value)


def test_complete_training_loop():
    """Five noisy steps are those of a loop that goes back one example at a time, with the same noise."""
    batches = [dit_batch(size, seed=size) for size in (4, 1, 6, 3, 5)]
    bound, lr = median_norm(one_at_a_time(dit(), dit_losses, *batches[0])), 0.1
    wrapped, optimizer, loss_fn = private(
        dit(), bound, expected_batch_size=4, noise_multiplier=1.0, lr=lr, generator=torch.Generator().manual_seed(7)
    )
    reference, generator = dit(), torch.Generator().manual_seed(7)
    for images, timesteps, labels, target in batches:
        here = copy.deepcopy(wrapped._module.state_dict())
        loss_fn(wrapped(images, timesteps, labels), target).backward()
        optimizer.step()
        there = dit()
        there.load_state_dict(here)
        truth = clipped_sum(one_at_a_time(there, dit_losses, images, timesteps, labels, target), bound)
        within(f"{len(images)} examples: clipped sum", oracle.relative_error(named(wrapped, "summed_grad"), truth))
        optimizer.zero_grad()
        sums = clipped_sum(one_at_a_time(reference, dit_losses, images, timesteps, labels, target), bound)
        with torch.no_grad():
            for name, parameter in reference.named_parameters():
                noise = torch.normal(0.0, bound, parameter.shape, generator=generator)
                parameter -= lr * (sums[name].float() + noise) / 4
    start, end = (dict(model.state_dict()) for model in (dit(), reference))
    within("parameters", oracle.relative_error(wrapped._module.state_dict(), end))
    assert oracle.relative_error(start, end) > 0.01
