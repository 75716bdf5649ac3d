"""Ways to be wrong that dither does not notice yet, one function each: expected to fail until they are mended.

Every test says what should hold: exact, or refused by a kind of CaptureError. The marks are strict, so a mended case
fails here until its mark is removed. `test_findings_steps.py` has those that need more than one step.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dither
from clipping.test_exactness import (
    STRATEGIES,
    Function,
    assert_exact,
    assert_exact_or_refused,
    loss_of,
    removal_moves,
)

pytestmark = pytest.mark.usefixtures("double_precision")
each_strategy = pytest.mark.parametrize("strategy", STRATEGIES)
B = 4


def silent(what):
    return pytest.mark.xfail(strict=True, reason=f"silently wrong: {what}")


def refuses_too_much(what):
    return pytest.mark.xfail(strict=True, reason=f"refused, though it could be exact: {what}")


def unnamed(what):
    return pytest.mark.xfail(strict=True, reason=f"an error that is not dither's: {what}")


# --- 1. in place on a view ----------------------------------------------------------------------


def _slice_mul(x, p):
    h = x.clone()
    h[..., :2].mul_(p)
    return h


def _slice_add_on_recorded(x, p, w):
    h = F.linear(x, w)
    h[..., :2].add_(p)
    return h


def _named_view(x, p):
    h = x.clone()
    view = h.view(-1, 2)
    view *= p
    return h


def _both_used(x, p):
    h = x.clone()
    view = h[..., :2]
    view.mul_(p)
    return torch.cat([h, view], -1)


@pytest.mark.parametrize(
    ("body", "shapes"),
    [
        (_slice_mul, {"p": (2,)}),
        (_slice_add_on_recorded, {"p": (2,), "w": (4, 4)}),
        (_named_view, {"p": (2,)}),
        (_both_used, {"p": (2,)}),
    ],
)
@silent("the gradient flows through the base, past the hook on the view's node")
def test_in_place_on_a_view_whose_base_is_used_afterwards(body, shapes):
    model, x = Function(body, **shapes), torch.randn(B, 4)
    assert_exact_or_refused(model, lambda: loss_of(model(x)))


AFTER = {
    "linear with a bias": lambda: nn.Linear(5, 5),  # on three dimensions torch returns a view of addmm's output
    "instance norm": lambda: nn.InstanceNorm1d(6, affine=True),
    "einsum": lambda: Function(lambda x, w: torch.einsum("btd,dp->btp", x, w), w=(5, 5)),
    "tensordot": lambda: Function(lambda x, w: torch.tensordot(x, w, dims=1), w=(5, 5)),
}
IN_PLACE = {
    "ReLU": lambda: nn.ReLU(inplace=True),
    "dropout": lambda: nn.Dropout(0.5, inplace=True),
    "layer scale": lambda: Function(lambda h, p: h.mul_(p), p=(5,)),
}


@pytest.mark.parametrize("after", AFTER)
@pytest.mark.parametrize("step", IN_PLACE)
@silent("a first layer's output is a view, so its gradient bypasses the hook once it is changed in place")
def test_in_place_on_a_first_output_that_is_a_view(step, after):
    model, x = nn.Sequential(AFTER[after](), IN_PLACE[step](), nn.Linear(5, 3)), torch.randn(B, 6, 5)
    assert_exact_or_refused(model, lambda: loss_of(model(x)))


# --- 2. rules -----------------------------------------------------------------------------------


@refuses_too_much("two_pass receives the use twice, and the first replay has changed the saved input")
def test_examples_overwritten_by_a_parameter():
    model, x = Function(lambda x, p: x.clone().copy_(p) * x, p=(5,)), torch.randn(B, 5)
    assert_exact(model, lambda: loss_of(model(x)))


@silent("two_pass rounds the clip factors to the losses' dtype, upwards too: 1.0027 C")
def test_clip_factors_of_losses_in_half_precision():
    model, x = nn.Linear(5, 3), torch.randn(B, 6, 5)
    for bound in (0.1, 0.2, 0.3, 0.37):
        for i in range(B):
            assert removal_moves(model, lambda k: loss_of(model(x[k])).bfloat16(), B, i, bound, "two_pass") <= 1 + 1e-9


@pytest.mark.parametrize("strategy", ["auto", "ghost", "tile", "two_pass"])
@silent("float32 squares underflow to zero before they are multiplied: norm 0, unclipped")
def test_ghost_norm_of_tiny_inputs_and_large_output_gradients(strategy):
    torch.set_default_dtype(torch.float32)
    model, x, weights = nn.Linear(16, 16, bias=False), torch.ones(2, 1, 16), torch.tensor([1e17, 1.0])
    x[0] *= 1e-23
    moved = removal_moves(model, lambda k: model(x[k]).flatten(1).sum(1) * weights[k], 2, 0, 1e-8, strategy)
    assert moved <= 1 + 1e-5


# --- 3. hooks and flags on parameters --------------------------------------------------------------


@silent("a hook on the parameter itself never runs, because the parameter is detached at its use")
def test_a_hook_on_a_parameter_that_masks_its_gradient():
    model, x = nn.Linear(5, 3), torch.randn(B, 5)
    model.weight.register_hook(lambda g: g * torch.tensor([1.0, 0.0, 0.0]).view(3, 1))
    assert_exact_or_refused(model, lambda: loss_of(model(x)))


@silent("a parameter counts as used although requires_grad is off at that moment")
def test_a_critic_frozen_while_the_actors_loss_is_computed():
    model, x = nn.ModuleDict({"actor": nn.Linear(5, 5), "critic": nn.Linear(5, 3)}), torch.randn(B, 5)

    def loss_fn():
        model["critic"].requires_grad_(False)
        loss = loss_of(model["critic"](model["actor"](x)))
        model["critic"].requires_grad_(True)
        return loss + loss_of(model["critic"](x))

    assert_exact_or_refused(model, loss_fn)


@silent("a hook that is not linear: two_pass weighs the losses before it, so the example is not clipped")
def test_a_hook_that_bends_the_gradient_in_two_passes():
    def body(x, w, p):
        h = F.linear(x, w) * 1
        h.register_hook(lambda g: g.clamp(-0.01, 0.01))
        return h * p

    model, x = Function(body, w=(5, 5), p=(5,)), torch.randn(B, 6, 5)
    assert removal_moves(model, lambda k: loss_of(model(x[k])), B, 1, 0.01, "two_pass") <= 1 + 1e-9


@unnamed("`inputs` argument to `grad()` cannot be empty")
def test_a_weight_detached_in_place():
    def body(x, w, p):
        weight = w * 2
        weight.detach_()
        return F.linear(x, weight) + p

    model, x = Function(body, w=(3, 5), p=(3,)), torch.randn(B, 5)
    assert_exact_or_refused(model, lambda: loss_of(model(x)))


class Doubling(nn.Parameter):
    """Doubles the output of every linear layer it is a weight of."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            output = func(*args, **(kwargs or {}))
        return output * 2 if func is F.linear else output


class Squashed(torch.Tensor):
    """Is passed through tanh before every linear layer."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is F.linear:
            return func(args[0].as_subclass(torch.Tensor).tanh(), *args[1:])
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("which", ["parameter", "input"])
@silent("a tensor type that changes what the operation does; the rule computes the plain operation")
def test_tensor_subclasses_that_change_an_operation(which):
    model, x = nn.Linear(5, 3), torch.randn(B, 5)
    if which == "parameter":
        model.weight = Doubling(model.weight.data)
    else:
        x = x.as_subclass(Squashed)
    assert_exact_or_refused(model, lambda: loss_of(model(x).as_subclass(torch.Tensor)), max_grad_norm=1e9)


# --- 4. refusals and errors of the wrong kind -----------------------------------------------------


MEETS = {
    "p.to(x)": lambda x, p: x + p.to(x),
    "p.type_as(x)": lambda x, p: x + p.type_as(x),
    "p.view_as": lambda x, p: x * p.view_as(x[0]),
    "broadcast_tensors": lambda x, p: torch.mul(*torch.broadcast_tensors(x, p)),
}


@pytest.mark.parametrize("name", MEETS)
@refuses_too_much("only the shape or dtype of the examples is read")
def test_a_parameter_takes_shape_or_dtype_from_the_examples(name):
    model, x = Function(MEETS[name], p=(5,)), torch.randn(B, 5)
    assert_exact(model, lambda: loss_of(model(x)))


@refuses_too_much("a frozen parameter is no example")
def test_low_rank_update_added_to_a_frozen_weight():
    class Merged(nn.Module):
        def __init__(self):
            super().__init__()
            self.base = nn.Parameter(torch.randn(3, 5), requires_grad=False)
            self.a, self.b = nn.Parameter(torch.randn(2, 5)), nn.Parameter(torch.randn(3, 2))

        def forward(self, x):
            return F.linear(x, self.base + self.b @ self.a)

    model, x = Merged(), torch.randn(B, 5)
    assert_exact(model, lambda: loss_of(model(x)))


@each_strategy
@refuses_too_much("ExampleAxisError stops the run on a first batch of which no example is finite")
def test_a_batch_of_which_no_example_is_finite_sums_to_zero(strategy):
    model, x = nn.Linear(3, 4), torch.full((B, 3), float("nan"))
    result = dither.clipped_sum(model, lambda: loss_of(model(x)), strategy=strategy)
    assert result.dropped == B and all(not g.any() for g in result.gradients.values())


@pytest.mark.parametrize("transform", ["vmap", "jvp"])
@unnamed("RuntimeError about autograd.Function and functorch")
def test_function_transforms_inside_the_loss(transform):
    model, x = nn.Linear(5, 3), torch.randn(B, 5)
    losses = {
        "vmap": lambda: torch.vmap(lambda row: loss_of(model(row).unsqueeze(0)).sum())(x),
        "jvp": lambda: loss_of(torch.func.jvp(model, (x,), (torch.ones_like(x),))[1]),
    }
    assert_exact_or_refused(model, losses[transform])


@pytest.mark.filterwarnings("ignore:Error detected in:UserWarning")
@unnamed("RuntimeError: returned nan values; the proofs send NaN back on purpose")
def test_anomaly_detection():
    model, x = nn.Linear(5, 3), torch.randn(B, 5)
    with torch.autograd.set_detect_anomaly(True, check_nan=True):
        assert_exact_or_refused(model, lambda: loss_of(model(x)))
