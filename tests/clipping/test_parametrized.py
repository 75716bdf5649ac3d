"""Parametrizations, weight and spectral norm, functional calls: exact with respect to what is trained, or refused."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrizations, parametrize, stateless

import dither
from clipping.test_exactness import STRATEGIES, Function, assert_exact, assert_refused, loss_of
from dither import errors

pytestmark = [
    pytest.mark.usefixtures("double_precision"),
    pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*stateless.functional_call.*:FutureWarning"),
]
B = 4


class Symmetric(nn.Module):
    def forward(self, w):
        return w.triu() + w.triu(1).mT


class Scaled(nn.Module):
    """A parametrization that has a parameter of its own, and a constant buffer."""

    def __init__(self):
        super().__init__()
        self.log_scale = nn.Parameter(torch.randn(5, 1) * 0.1)
        self.register_buffer("mask", torch.ones(5, 5).tril())

    def forward(self, w):
        return w * self.log_scale.exp() * self.mask


def parametrized(layer, parametrization):
    parametrize.register_parametrization(layer, "weight", parametrization)
    return layer


LINEAR = {
    "weight norm": lambda: parametrizations.weight_norm(nn.Linear(5, 5)),
    "weight norm over everything": lambda: parametrizations.weight_norm(nn.Linear(5, 5), dim=None),
    "old weight norm": lambda: nn.utils.weight_norm(nn.Linear(5, 5)),
    "old weight norm, other axis": lambda: nn.utils.weight_norm(nn.Linear(5, 5), dim=1),
    "orthogonal, matrix exponential": lambda: parametrizations.orthogonal(nn.Linear(5, 5)),
    "orthogonal, Cayley": lambda: parametrizations.orthogonal(nn.Linear(5, 5), orthogonal_map="cayley"),
    "orthogonal, Householder": lambda: parametrizations.orthogonal(nn.Linear(5, 5), orthogonal_map="householder"),
    "custom": lambda: parametrized(nn.Linear(5, 5), Symmetric()),
    "custom with a parameter": lambda: parametrized(nn.Linear(5, 5), Scaled()),
    "two, one on the other": lambda: parametrized(parametrized(nn.Linear(5, 5), Symmetric()), Scaled()),
}


@pytest.mark.parametrize("name", LINEAR)
def test_parametrized_linear(name):
    model, x = LINEAR[name](), torch.randn(B, 3, 5)
    assert_exact(model, lambda: loss_of(model(x)))
    assert_exact(model, lambda: loss_of(model(model(x).tanh())))


@pytest.mark.parametrize("norm", [parametrizations.weight_norm, nn.utils.weight_norm])
@pytest.mark.parametrize("layer", [nn.Conv2d, nn.ConvTranspose2d])
def test_weight_norm_of_a_convolution(norm, layer):
    model, x = norm(layer(2, 3, 2)), torch.randn(B, 2, 4, 4)
    assert_exact(model, lambda: loss_of(model(x)))


@pytest.mark.parametrize("norm", [parametrizations.spectral_norm, nn.utils.spectral_norm])
@pytest.mark.parametrize("layer", ["linear", "convolution"])
@pytest.mark.parametrize("training", [True, False])
def test_spectral_norm_whose_power_iteration_sees_no_data(norm, layer, training):
    """In train mode its vectors are buffers that every forward changes, from the weight alone: exact."""
    model = norm(nn.Linear(5, 4) if layer == "linear" else nn.Conv2d(2, 3, 2)).train(training)
    x = torch.randn(B, 3, 5) if layer == "linear" else torch.randn(B, 2, 4, 4)
    vectors = {name: b.clone() for name, b in model.named_buffers()}

    def restore():
        for name, buffer in model.named_buffers():
            buffer.data = vectors[name].clone()

    assert_exact(model, lambda: loss_of(model(x)), before=restore)
    restore()
    dither.clipped_sum(model, lambda: loss_of(model(x)))
    moved = any(not torch.equal(b, vectors[name]) for name, b in model.named_buffers())
    assert moved == training


def test_weights_cached_inside_are_exact_and_cached_before_are_refused():
    model, x = parametrized(nn.Linear(5, 5), Symmetric()), torch.randn(B, 5)

    def cached():
        with parametrize.cached():
            return loss_of(model(model(x).tanh()))

    assert_exact(model, cached)
    with parametrize.cached():
        model(x)
        assert_refused(model, lambda: loss_of(model(x)), errors.CoverageError, match="outside the recorder")


def test_weights_generated_by_another_parameter():
    def body(x, code, generator, shift):
        weight = F.linear(code, generator).view(4, 5)
        return F.linear(x, weight / weight.norm(), shift)

    model, x = Function(body, code=(3,), generator=(20, 3), shift=(4,)), torch.randn(B, 3, 5)
    assert_exact(model, lambda: loss_of(model(x)))


def test_frozen_parts_of_a_generated_weight():
    """A product of two low-rank factors beside the frozen layer's output, as LoRA does it."""

    class LowRank(nn.Module):
        def __init__(self):
            super().__init__()
            self.base = nn.Linear(5, 4).requires_grad_(False)
            self.a, self.b = nn.Parameter(torch.randn(2, 5)), nn.Parameter(torch.randn(4, 2))

        def forward(self, x):
            return self.base(x) + F.linear(x, self.b @ self.a) + F.linear(F.linear(x, self.a), self.b)

    model, x = LowRank(), torch.randn(B, 3, 5)
    assert_exact(model, lambda: loss_of(model(x)))


# --- functional calls ----------------------------------------------------------------------------


def two_layers():
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)), torch.randn(B, 5)


@pytest.mark.parametrize("call", [functional_call, stateless.functional_call])
def test_functional_call_with_the_models_own_parameters(call):
    model, x = two_layers()
    assert_exact(model, lambda: loss_of(call(model, dict(model.named_parameters()), (x,))))


def test_functional_call_with_tensors_computed_from_the_parameters():
    model, x = two_layers()

    def loss_fn():
        changed = {name: p * 0.5 + p.detach() for name, p in model.named_parameters()}
        return loss_of(functional_call(model, changed, (x,))) + loss_of(model(x))

    assert_exact(model, loss_fn)


def test_functional_call_with_swapped_parameters():
    """The first layer computes with the third's weight: it is the third's gradient."""
    model = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5))
    x = torch.randn(B, 5)
    assert_exact(model, lambda: loss_of(functional_call(model, {"0.weight": model[2].weight}, (x,))))


def test_functional_call_with_tensors_computed_before_is_refused():
    model, x = two_layers()
    before = {name: p * 0.5 for name, p in model.named_parameters()}
    assert_refused(model, lambda: loss_of(functional_call(model, before, (x,))), errors.CoverageError)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_functional_call_with_foreign_tensors_trains_nothing_of_them(strategy):
    """A replaced parameter has no part in the loss, as autograd says; without any part of the model, a refusal."""
    model, x = two_layers()
    foreign = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    part = {"0.weight": foreign["0.weight"]}
    assert_exact(model, lambda: loss_of(functional_call(model, part, (x,))))
    result = dither.clipped_sum(model, lambda: loss_of(functional_call(model, foreign, (x,))), strategy=strategy)
    assert all(not g.any() for g in result.gradients.values()) and not result.norms.any()
    assert all(t.grad is None for t in foreign.values())
    constant = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(errors.CoverageError, match="No trainable parameter"):
        dither.clipped_sum(model, lambda: loss_of(functional_call(model, constant, (x,))), strategy=strategy)


def test_functional_call_on_a_skeleton():
    """The trained tensors live in one model, and another model, a mere skeleton, computes with them."""
    model, x = two_layers()
    skeleton = copy.deepcopy(model).requires_grad_(False)
    assert_exact(model, lambda: loss_of(functional_call(skeleton, dict(model.named_parameters()), (x,))))
