"""The user's own hooks, on tensors and modules: their effect on gradients is each example's own, or a refusal."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dither
import oracle
from clipping.test_exactness import STRATEGIES, Function, assert_exact, assert_refused, loss_of, removal_moves
from dither import errors

pytestmark = pytest.mark.usefixtures("double_precision")
B = 4


def hooked(hook, place):
    """Two layers and a scale, with a hook on one of the tensors between them."""

    def body(x, w, v, p):
        x = x.clone().requires_grad_()
        first = F.linear(x, w)
        scaled = first * p
        tensors = {"input": x, "output": first, "scaled": scaled, "weight made of p": p * 2}
        tensors[place].register_hook(hook)
        return F.linear(scaled.tanh() * tensors["weight made of p"], v)

    return Function(body, w=(5, 5), v=(3, 5), p=(5,))


@pytest.mark.parametrize("place", ["input", "output", "scaled", "weight made of p"])
def test_hooks_on_tensors_that_scale_the_gradient(place):
    model, x = hooked(lambda g: g * -3, place), torch.randn(B, 6, 5)
    assert_exact(model, lambda: loss_of(model(x)))


def test_a_hook_that_masks_entries():
    model, x = hooked(lambda g: g * torch.tensor([1.0, 0, 1, 0, 2]), "scaled"), torch.randn(B, 6, 5)
    assert_exact(model, lambda: loss_of(model(x)))


def test_several_hooks_and_retained_gradients():
    def body(x, w, v):
        h = F.linear(x, w)
        h.register_hook(lambda g: g * 2)
        h.register_hook(lambda g: g + g.roll(1, -1))
        h.retain_grad()
        return F.linear(h, v)

    model, x = Function(body, w=(5, 5), v=(3, 5)), torch.randn(B, 5)
    assert_exact(model, lambda: loss_of(model(x)))


def test_a_hook_that_mixes_examples_is_refused():
    for mix, error in (
        (lambda g: g / g.norm(), errors.CoupledExamplesError),
        (lambda g: g - g.mean(0), errors.CoupledExamplesError),
        (lambda g: g.flip(0), errors.CaptureError),
    ):
        for place in ("output", "scaled"):
            model, x = hooked(mix, place), torch.randn(B, 5)
            assert_refused(model, lambda m=model, x=x: loss_of(m(x)), error)


def test_a_hook_that_only_looks_changes_nothing():
    seen = []
    model, x = hooked(seen.append, "scaled"), torch.randn(B, 5)
    assert_exact(model, lambda: loss_of(model(x)))
    assert seen


@pytest.mark.parametrize("strategy", ["auto", "hold", "ghost", "tile"])
def test_a_hook_that_bends_the_gradient_in_one_pass(strategy):
    """Not linear in the gradient: each example's own, so strategies that send the losses back once are exact."""
    model, x = hooked(lambda g: g.clamp(-0.01, 0.01), "scaled"), torch.randn(B, 5)
    truth = oracle.per_example_gradients(model, lambda: loss_of(model(x)))
    bound = float(oracle.norms(truth).median()) / 10
    result = dither.clipped_sum(model, lambda: loss_of(model(x)), max_grad_norm=bound, strategy=strategy)
    assert oracle.relative_error(result.gradients, oracle.clipped_sum(truth, bound)) <= 1e-10


def test_a_hook_that_bends_the_gradient_in_two_passes():
    """The second pass sends the losses through it as the first did: each example moves the sum by the bound at most."""
    model, x = hooked(lambda g: g.clamp(-0.01, 0.01), "scaled"), torch.randn(B, 6, 5)
    for i in range(B):
        assert removal_moves(model, lambda k: loss_of(model(x[k])), B, i, 0.01, "two_pass") <= 1 + 1e-9


def test_a_hook_on_a_parameter_is_refused():
    model, x = nn.Linear(5, 3), torch.randn(B, 5)
    handle = model.weight.register_hook(lambda g: g * torch.tensor([1.0, 0.0, 0.0]).view(3, 1))
    assert_refused(model, lambda: loss_of(model(x)), errors.UnsupportedOpError, match="hook")
    handle.remove()
    assert_exact(model, lambda: loss_of(model(x)))


# --- hooks on modules ----------------------------------------------------------------------------


def _replace_input(module, args):
    return (args[0].roll(1, -1) * 2,)


def _add_keyword(module, args, kwargs):
    return args, {**kwargs, "scale": 3.0}


class Scaled(nn.Linear):
    def forward(self, x, scale=1.0):
        return super().forward(x) * scale


HOOKS = {
    "forward pre-hook that changes inputs": lambda m: m.register_forward_pre_hook(_replace_input),
    "forward pre-hook that adds a keyword": lambda m: m.register_forward_pre_hook(_add_keyword, with_kwargs=True),
    "forward hook that changes the output": lambda m: m.register_forward_hook(lambda mod, a, y: y.tanh() + mod.bias),
    "forward hook that uses the weight": lambda m: m.register_forward_hook(lambda mod, a, y: y @ mod.weight),
    "forward hook that looks": lambda m: m.register_forward_hook(lambda mod, a, y: None),
}


@pytest.mark.parametrize("name", HOOKS)
def test_module_hooks(name):
    model, x = nn.Sequential(Scaled(5, 5), nn.Tanh(), nn.Linear(5, 5)), torch.randn(B, 6, 5)
    handle = HOOKS[name](model[0])
    assert_exact(model, lambda: loss_of(model(x)))
    handle.remove()
    assert_exact(model, lambda: loss_of(model(x)))


BACKWARD = {
    "pre-hook": lambda m: m.register_full_backward_pre_hook(lambda mod, g: (g[0] * 2,)),
    "hook": lambda m: m.register_full_backward_hook(lambda mod, gi, go: (gi[0] * 3,)),
    "hook that looks": lambda m: m.register_full_backward_hook(lambda mod, gi, go: None),
}


@pytest.mark.parametrize("name", BACKWARD)
def test_module_backward_hooks(name):
    model, x = nn.Sequential(nn.Linear(5, 5), nn.Sequential(nn.Linear(5, 5), nn.Tanh()), nn.Linear(5, 3)), None
    BACKWARD[name](model[1])
    x = torch.randn(B, 6, 5)
    assert_exact(model, lambda: loss_of(model(x)))


def test_accumulation_hooks_on_parameters_do_not_run():
    """They belong to `.grad`, which dither leaves alone."""
    model, x, seen = nn.Linear(5, 3), torch.randn(B, 5), []
    model.weight.register_post_accumulate_grad_hook(seen.append)
    assert_exact(model, lambda: loss_of(model(x)))
    assert not seen and model.weight.grad is None


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_users_modes_around_the_loss(strategy):
    """Saved tensors in another form or on another device, a default device."""
    model, x = nn.Sequential(nn.Conv1d(6, 4, 2), nn.GELU(), nn.Linear(4, 3)), torch.randn(B, 6, 5)
    truth = oracle.clipped_sum(oracle.per_example_gradients(model, lambda: loss_of(model(x))), 1.0)
    packed = torch.autograd.graph.saved_tensors_hooks(lambda t: t.numpy(), torch.from_numpy)
    for mode in (packed, torch.device("cpu"), torch.autograd.graph.save_on_cpu()):
        with mode:
            result = dither.clipped_sum(model, lambda: loss_of(model(x)), strategy=strategy)
        assert oracle.relative_error(result.gradients, truth) <= 1e-10
