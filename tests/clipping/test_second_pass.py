"""two_pass: what the second backward pass sums is proved to be what the first one normed, or refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import dither
import oracle
from dither import errors
from dither.capture.examples import ExampleAxis, Ragged
from dither.clipping.repeats import Fingerprint, tolerance


class Stateful(torch.autograd.Function):
    """Its backward multiplies by the number of times that it ran, or gives nothing in one of them."""

    runs = 0
    kind = "counts"

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        Stateful.runs += 1
        if Stateful.kind == "counts":
            return gradient * Stateful.runs
        return None if Stateful.runs % 2 == (Stateful.kind == "nothing first") else gradient


def layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), torch.randn(4, 6, 8)


def hooked(hook):
    model, x = layers()

    def loss_fn():
        h = model[0](x) * 1
        h.register_hook(hook)
        return model[1](h).square().flatten(1).sum(1)

    return model, loss_fn


def drops_out():
    model, x = layers()

    def loss_fn():
        body = nn.Sequential(model[0], nn.Dropout(0.5), model[1])
        h = checkpoint(body, x, use_reentrant=False, preserve_rng_state=False)
        return h.square().flatten(1).sum(1)

    return model, loss_fn


def stateful(kind):
    model, x = layers()
    Stateful.kind = kind
    return model, lambda: model[1](Stateful.apply(model[0](x) * 1)).square().flatten(1).sum(1)


def into_of(model):
    return {name: torch.ones_like(p) for name, p in model.named_parameters()}


def refused_or_bounded(model, loss_fn, times=12):
    """Steps of two_pass; each keeps the bound, or is refused and adds nothing. Gives how many were refused."""
    refused = 0
    for _ in range(times):
        into = into_of(model)
        try:
            result = dither.clipped_sum(model, loss_fn, strategy="two_pass", into=into)
        except errors.CoverageError as error:
            refused += 1
            assert "second backward pass" in str(error) and "'tile'" in str(error)
            assert all(bool((total == 1).all()) for total in into.values())
        else:
            added = sum((total - 1).square().sum() for total in result.gradients.values())
            assert float(added.sqrt()) <= 4 * (1 + 1e-5)
    return refused


@pytest.mark.parametrize(
    "hook",
    [
        lambda g: g * (torch.rand(()) < 0.5) * 1e3,
        lambda g: g * torch.where(torch.rand_like(g) < 0.5, -1.0, 1.0),
        lambda g: g[..., torch.randperm(8)],
        lambda g: g[:, torch.randperm(6)],
        lambda g: g * torch.stack([torch.ones(()), torch.ones(()), torch.rand(()), torch.ones(())]).view(4, 1, 1),
    ],
)
def test_a_hook_that_draws_random_numbers_is_refused(hook):
    assert refused_or_bounded(*hooked(hook)) >= 2


@pytest.mark.parametrize("kind", ["counts", "nothing first", "nothing second"])
def test_a_backward_with_a_state_is_refused(kind):
    Stateful.runs = 0
    model, loss_fn = stateful(kind)
    Stateful.kind = "plain"
    dither.clipped_sum(model, loss_fn)  # the proofs' own backward passes, once for these operations
    Stateful.runs, Stateful.kind = 0, kind
    assert refused_or_bounded(model, loss_fn, times=1) == 1


def test_a_checkpoint_that_recomputes_with_other_random_numbers_is_refused():
    assert refused_or_bounded(*drops_out()) == 12


def test_an_honest_hook_and_an_honest_checkpoint_pass():
    model, loss_fn = hooked(lambda g: g.clamp(-0.01, 0.01))
    assert refused_or_bounded(model, loss_fn) == 0
    into = into_of(model)
    before = {name: total.clone() for name, total in into.items()}
    dither.clipped_sum(model, loss_fn, strategy="two_pass", into=into)
    once = dither.clipped_sum(model, loss_fn, strategy="tile").gradients
    added = {name: into[name] - before[name] for name in into}
    assert oracle.relative_error(added, once) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64])
@pytest.mark.parametrize(
    "layout", [ExampleAxis(0, 1, 4, 1), ExampleAxis(1, 2, 4, 1), ExampleAxis(2, 1, 4, 2), Ragged(2, 4, torch.arange(8))]
)
def test_fingerprints_show_each_change_of_an_entry(layout, dtype):
    shape = [3, 5, 7]
    shape[layout.axis] = layout.size
    tensor = torch.randn(shape).to(dtype)
    for bitwise in (True, False):
        first = Fingerprint.of(tensor, layout, bitwise)
        assert first.products.shape == (layout.size,)
        assert Fingerprint.of(tensor.clone(), layout, bitwise).repeats(first, None, dtype)
        for changed in (tensor.flip(0), tensor.flip(1), tensor.flip(2), -tensor, tensor * 1.1):
            assert not Fingerprint.of(changed, layout, bitwise).repeats(first, None, dtype)
    loose = Fingerprint.of(tensor, layout, False)
    noise = 0.01 * tolerance(dtype) * torch.randn(shape).to(dtype) * tensor.abs()
    assert Fingerprint.of(tensor + noise, layout, False).repeats(loose, None, dtype)
    factors = torch.rand(layout.size)
    scaled = tensor * factors.view([-1 if a == layout.axis else 1 for a in range(3)]).to(dtype)
    assert Fingerprint.of(scaled, layout, False).repeats(loose, factors, dtype)
    assert not Fingerprint.of(scaled, layout, False).repeats(loose, factors * 1.1, dtype)
