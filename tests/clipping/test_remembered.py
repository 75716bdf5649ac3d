"""What makes a later step another than the one that was proved: each is proved anew, or in every step."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dither
import oracle
from clipping.test_layouts_over_steps import _Counting
from dither import errors

pytestmark = pytest.mark.usefixtures("double_precision")
B = 5


def losses_of(h):
    return h.reshape(B, -1).square().sum(1)


class Straight(torch.autograd.Function):
    """The gradient as it comes."""

    @staticmethod
    def forward(ctx, h):
        return h.view_as(h)

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class Centred(Straight):
    """The gradient without its mean over the batch."""

    @staticmethod
    def backward(ctx, gradient):
        return gradient - gradient.mean(0)


class Chosen(torch.autograd.Function):
    """One of the two, as an object says."""

    @staticmethod
    def forward(ctx, h, options):
        ctx.options = options
        return h.view_as(h)

    @staticmethod
    def backward(ctx, gradient):
        return gradient - gradient.mean(0) if ctx.options.centred else gradient.clone(), None


@torch.jit.script
def _scripted(h: torch.Tensor, dim: int) -> torch.Tensor:
    return h - h.mean(dim, keepdim=True)


def _one_of_two_losses(h, mixed):
    both = h.square().sum(1), (h - h.mean(0)).square().sum(1)
    return both[mixed]


def _hooked(h, mixed):
    h = h * 1
    h.register_hook(lambda gradient: gradient - gradient.mean(0) if mixed else gradient)
    return losses_of(h)


def _hooked_at_its_node(h, mixed):
    h = h * 1
    h.grad_fn.register_hook(lambda given, _: tuple(g - g.mean(0) if mixed and g is not None else g for g in given))
    return losses_of(h)


def _hooked_module(h, mixed):
    layer = nn.Tanh()
    layer.register_full_backward_hook(lambda _, given, __: tuple(g - g.mean(0) if mixed else g for g in given))
    return losses_of(layer(h))


MIXED = {
    "another of the same losses is returned": _one_of_two_losses,
    "axis -2 for -1": lambda h, mixed: h.softmax(-2 if mixed else -1)[:, 0],
    "an axis that is a numpy integer": lambda h, mixed: h.softmax(np.int64(0 if mixed else 1))[:, 0],
    "rows from a numpy integer on": lambda h, mixed: losses_of(
        F.pad(h, (0, 0, 2, 2)).narrow(0, np.int64(3 if mixed else 2), B)
    ),
    "axes of a numpy array": lambda h, mixed: losses_of(h.permute(*np.array([1, 0] if mixed else [0, 1]))),
    "True for 1": lambda h, mixed: losses_of((h.T - h.var(True if mixed else 1).expand(B)).T),
    "a tensor for a number": lambda h, mixed: losses_of(h.sub(other=(h.mean(0), 5)[not mixed])),
    "a custom function of the same forward": lambda h, mixed: losses_of((Centred if mixed else Straight).apply(h)),
    "an object that a custom function is given": lambda h, mixed: losses_of(
        Chosen.apply(h, SimpleNamespace(centred=mixed))
    ),
    "a scripted function": lambda h, mixed: losses_of(_scripted(h, 0 if mixed else 1)),
    "the order of torch.embedding": lambda h, mixed: losses_of(torch.embedding(h, _ORDERS[mixed])),
    "a hook on a tensor": _hooked,
    "a hook on a node": _hooked_at_its_node,
    "a hook on a module": _hooked_module,
}
_ORDERS = torch.arange(B), torch.arange(B).roll(2)


@pytest.mark.parametrize("what", MIXED)
def test_a_later_step_that_mixes_examples_is_refused(what):
    model, x = nn.Linear(4, B), torch.randn(B, 4)

    def loss_fn(mixed):
        return MIXED[what](model(x), mixed)

    truth = oracle.clipped_sum(oracle.per_example_gradients(model, lambda: loss_fn(False)), 0.5)
    for step in range(1, 9):  # proved again in the 1st, 2nd, 4th and 8th
        if step in (3, 6, 7):
            with pytest.raises((errors.CoupledExamplesError, errors.ExampleAxisError)):
                dither.clipped_sum(model, lambda: loss_fn(True), max_grad_norm=0.5)
        else:
            result = dither.clipped_sum(model, lambda: loss_fn(False), max_grad_norm=0.5)
            assert oracle.relative_error(result.gradients, truth) <= 1e-10


SHAPES = {
    "where": lambda p, t: torch.where(t > 0.3, p, 0.1),
    "a mask": lambda p, t: torch.where(t, p, 0.1),
    "lerp": lambda p, t: torch.lerp(p, t, 0.5),
    "a keyword": lambda p, t: torch.mul(p, other=t),
}


@pytest.mark.parametrize("what", SHAPES)
def test_targets_of_another_shape_on_a_later_step_are_refused(what):
    model, x, targets = nn.Linear(4, 1), torch.randn(B, 4), torch.rand(B)
    targets = targets > 0.3 if what == "a mask" else targets
    column = targets.unsqueeze(1)

    def loss_fn(t):
        return losses_of(SHAPES[what](model(x).flatten(), t))

    for _ in range(2):
        dither.clipped_sum(model, lambda: loss_fn(targets))
    with pytest.raises(errors.CoupledExamplesError):
        dither.clipped_sum(model, lambda: loss_fn(column))


def _passes(model, x):
    _Counting.passes = 0
    dither.clipped_sum(model, lambda: _Counting.apply(losses_of(model(x))))
    return _Counting.passes


def test_another_length_takes_a_short_proof():
    model = nn.Linear(4, 3)
    first, second, third = (_passes(model, torch.randn(B, length, 4)) for length in (8, 8, 6))
    assert first == second > third > 1


def test_other_rows_of_the_same_memory_take_no_proof():
    model, data = nn.Linear(4, 3), torch.randn(3 * B, 4)
    assert [_passes(model, data[start : start + B]) for start in (0, B, 2 * B)][2] == 1
