"""What does not hold yet, or cannot be seen: each case belongs in the docs' list of limits, and is expected to fail.

Every test says what should hold: exact, or refused by a kind of CaptureError. The marks are strict, so a mended case
fails here until it moves to the file of its subject.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dither
from clipping.test_buffers import Updated
from clipping.test_exactness import Function, assert_exact_or_refused, loss_of, removal_moves
from dither import errors

pytestmark = pytest.mark.usefixtures("double_precision")
B = 4


def limit(what):
    return pytest.mark.xfail(strict=True, raises=(AssertionError, errors.CaptureError), reason=what)


# --- silently wrong: nothing in a graph of gradients shows it ----------------------------------------


def two_layers():
    return nn.ModuleList([nn.Linear(5, 5), nn.Linear(5, 5)])


VALUES = {
    "inputs standardised over the batch": lambda m, x: loss_of(m[1](m[0]((x - x.mean(0)) / x.std(0)).tanh())),
    "detached batch mean": lambda m, x: loss_of(m[1]((h := m[0](x)) - h.detach().mean(0))),
    "weights from detached losses": lambda m, x: (v := loss_of(m[1](m[0](x)))) * v.detach().softmax(0),
    "a Python number of the batch": lambda m, x: loss_of(m[1]((h := m[0](x)) * float(h.detach().std()))),
    "mixup": lambda m, x: loss_of(m[1](m[0](0.7 * x + 0.3 * x.roll(1, 0)).tanh())),
    "targets from the batch": lambda m, x: (m[0](x) - x.mean(0)).square().sum(1),
}


@pytest.mark.parametrize("how", VALUES)
@limit("a value, not a gradient, carries the other examples: the sum moves by up to 3.4 C")
def test_values_of_other_examples(how):
    model, x = two_layers(), torch.randn(B, 5)
    x[0] *= 50
    try:
        moved = removal_moves(model, lambda k: VALUES[how](model, x[k]), B, 0, 1.0, "auto")
    except errors.CaptureError:
        return
    assert moved <= 1 + 1e-9


def _set_data(module, x):
    module.kept.data = x.mean(0)


STATE = {
    ".data of a buffer": _set_data,
    ".data in place": lambda m, x: m.kept.data.add_(x.mean(0)),
    "numpy": lambda m, x: m.kept.numpy().__setitem__(slice(None), x.mean(0).numpy()),
    "a Python number": lambda m, x: m.kept.fill_(x.mean().item()),
    ".data of a frozen parameter": lambda m, x: m.frozen.data.lerp_(x.mean(0), 0.1),
    ".data of a trained parameter": lambda m, x: m.trained.data.add_(x.mean(0)),
}


@pytest.mark.parametrize("how", STATE)
@limit("state is updated from data behind torch's back: through .data, numpy or a Python number")
def test_state_updated_out_of_sight(how):
    model, x = Updated(STATE[how]), torch.randn(B, 5)
    before = [t.clone() for t in (model.kept, model.frozen, model.trained)]
    try:
        dither.clipped_sum(model, lambda: loss_of(model(x)))
    except errors.CaptureError:
        return
    after = (model.kept, model.frozen, model.trained)
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True)), "data moved the model's state"


@limit("the user's hook turns the proof's NaN into zero, so the coupling above it is not seen")
def test_coupling_behind_a_hook_that_removes_nan():
    def body(x, w, v):
        h = F.linear(x, w)
        centred = h - h.mean(0)
        centred.register_hook(lambda g: g.nan_to_num(0.0))
        return F.linear(h + centred, v)

    model, x = Function(body, w=(5, 5), v=(3, 5)), torch.randn(B, 5)
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
@limit("a tensor type that changes what the operation does: the rule computes the plain operation")
def test_tensor_subclasses_that_change_an_operation(which):
    model, x = nn.Linear(5, 3), torch.randn(B, 5)
    if which == "parameter":
        model.weight = Doubling(model.weight.data)
    else:
        x = x.as_subclass(Squashed)
    assert_exact_or_refused(model, lambda: loss_of(model(x).as_subclass(torch.Tensor)), max_grad_norm=1e9)


# --- refused though possible -----------------------------------------------------------------------------


@limit("no example is finite in a first batch: one example's NaN may have spread, so where they lie is undecided")
def test_a_first_batch_of_which_no_example_is_finite_sums_to_zero():
    model, x = nn.Linear(3, 4), torch.full((B, 3), float("nan"))
    result = dither.clipped_sum(model, lambda: loss_of(model(x)))
    assert result.dropped == B and all(not g.any() for g in result.gradients.values())
