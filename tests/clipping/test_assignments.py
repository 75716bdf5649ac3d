"""Parameters written into what examples computed, and operations that overwrite it: exact, or refused by name."""

from __future__ import annotations

import numpy
import pytest
import torch
import torch.nn.functional as F

import dither
import oracle
from clipping.test_exactness import STRATEGIES, Function, assert_exact, assert_refused, loss_of
from dither import errors

pytestmark = pytest.mark.usefixtures("double_precision")
B, T = 4, 3


def _drawn_by_numpy(*shape):
    return torch.tensor(numpy.random.default_rng(5).random(shape) < 0.5)


def _batch_first(h, p):
    h[_drawn_by_numpy(B, T)] = p
    return h


def _time_first(h, p):
    h = h.transpose(0, 1).contiguous()
    h[_drawn_by_numpy(T, B)] = p
    return h.transpose(0, 1)


def _steps_alone(h, p):
    h.transpose(0, 1)[torch.tensor([True, False, True])] = p
    return h


def _whole_examples(h, p):
    h[torch.tensor([False, True, True, False])] = p
    return h


def _one_step(h, p):
    h[:, 1][_drawn_by_numpy(B)] = p
    return h


def _feature_by_feature(h, p):
    h[_drawn_by_numpy(B, T, 5)] = p[0]
    return h


def _nowhere(h, p):
    h[torch.zeros(B, T, dtype=torch.bool)] = p
    return h + p


def _twice(h, p):
    h[_drawn_by_numpy(B, T)] = p
    h[h.detach()[..., 0] > 0] = p * 2
    return h


def _computed_from_the_parameter(h, p):
    h[_drawn_by_numpy(B, T)] = p.outer(p) @ p
    return h


MASKS = {
    "batch first": _batch_first,
    "time first": _time_first,
    "steps alone": _steps_alone,
    "whole examples": _whole_examples,
    "one step, a view": _one_step,
    "every axis": _feature_by_feature,
    "nowhere": _nowhere,
    "twice": _twice,
    "computed": _computed_from_the_parameter,
}


@pytest.mark.parametrize("how", MASKS)
@pytest.mark.parametrize("first", ["a layer", "the data"])
def test_a_parameter_where_a_mask_is_true(how, first):
    def body(x, w, p):
        h = F.linear(x, w) if first == "a layer" else x * 1
        return F.linear(MASKS[how](h, p).tanh(), w)

    model, x = Function(body, w=(5, 5), p=(5,)), torch.randn(B, T, 5)
    assert_exact(model, lambda: loss_of(model(x)))


def test_as_many_steps_as_examples():
    def body(x, w, p):
        h = F.linear(x, w)
        h[torch.eye(B).bool()] = p
        return F.linear(h.transpose(0, 1).tanh(), w)

    model, x = Function(body, w=(5, 5), p=(5,)), torch.randn(B, B, 5)
    assert_exact(model, lambda: model(x).square().sum((0, 2)))  # example i is x[i]
    time_first = x.transpose(0, 1)
    assert_exact(model, lambda: model(time_first).square().sum((1, 2)))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_other_masks_on_later_steps(strategy):
    def body(x, mask, w, p):
        h = F.linear(x, w)
        h[mask] = p
        return F.linear(h.tanh(), w)

    model = Function(body, w=(5, 5), p=(5,))
    for seed, batch in enumerate((B, B, 2, B, 1, B)):
        generator = torch.Generator().manual_seed(seed)
        x, mask = torch.randn(batch, T, 5, generator=generator), torch.rand(batch, T, generator=generator) < 0.5

        def loss_fn(x=x, mask=mask):
            return loss_of(model(x, mask))

        truth = oracle.clipped_sum(oracle.per_example_gradients(model, loss_fn), 0.5)
        result = dither.clipped_sum(model, loss_fn, max_grad_norm=0.5, strategy=strategy)
        assert oracle.relative_error(result.gradients, truth) <= 1e-10


# --- wrong on purpose --------------------------------------------------------------------------------


def _losses_by_step(h):
    return h.transpose(0, 1)


def _centred_afterwards(h):
    return h - h.mean(0)


def _neighbours_afterwards(h):
    return h + h.roll(1, 0)


@pytest.mark.parametrize("mixed", [_losses_by_step, _centred_afterwards, _neighbours_afterwards])
@pytest.mark.parametrize("first", ["a layer", "the declared data"])
def test_examples_that_meet_after_the_assignment_are_refused(mixed, first):
    """Also with as many steps as examples: the losses are then of steps, in what the mask's axes call examples."""

    def body(x, w, p):
        before = F.linear(x, w) if first == "a layer" else x * 1
        h = before.clone()
        h[_drawn_by_numpy(B, B)] = p
        return F.linear(before + mixed(h), w)

    model, x = Function(body, w=(5, 5), p=(5,)), dither.batched(torch.randn(B, B, 5))
    assert_refused(model, lambda: loss_of(model(x)), errors.CaptureError)


def test_rows_written_by_a_mask_from_rows_of_a_parameter_stay_exact_or_refused():
    """One row of a parameter for each place that the mask picks: which is whose depends on the mask alone."""
    mask = torch.tensor([[True, False, True], [True, True, False], [False, True, False], [True, True, True]])

    def body(x, w, p):
        h = F.linear(x, w)
        h[mask] = p
        return F.linear(h.tanh(), w)

    model, x = Function(body, w=(5, 5), p=(int(mask.sum()), 5)), torch.randn(B, T, 5)
    assert_exact(model, lambda: loss_of(model(x)))


def test_torch_refuses_a_mask_of_another_shape():
    def body(x, w, p):
        h = F.linear(x, w)
        h[torch.ones(1, T, dtype=torch.bool)] = p
        return h

    model, x = Function(body, w=(5, 5), p=(5,)), torch.randn(B, T, 5)
    with pytest.raises(IndexError):
        dither.clipped_sum(model, lambda: loss_of(model(x)))


# --- operations without a rule that overwrite the examples ---------------------------------------------

OVERWRITING = {
    "copy_": lambda x, p: x.clone().copy_(p) * x,
    "ldexp_": lambda x, p: F.linear(x, torch.eye(5)).ldexp_(p),
    "ldexp_ after a layer": lambda x, p: F.linear(x, p.outer(p)).ldexp_(p),
}


def _takes_no_gradient(how):
    """Of torch 2.6 it is ldexp_."""
    try:
        OVERWRITING[how](torch.ones(1, 5), torch.ones(5, requires_grad=True))
    except RuntimeError:
        return True
    return False


OVERWRITTEN = [
    pytest.param(how, marks=pytest.mark.skipif(_takes_no_gradient(how), reason="without a gradient in this torch"))
    for how in OVERWRITING
]


@pytest.mark.parametrize("how", OVERWRITTEN)
def test_examples_overwritten_by_an_operation_without_a_rule(how):
    model, x = Function(OVERWRITING[how], p=(5,)), torch.randn(B, 5)
    assert_exact(model, lambda: loss_of(model(x)))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("how", OVERWRITTEN[1:])
def test_the_others_of_a_batch_with_an_example_that_is_not_finite(how, strategy):
    """Such an operation runs again for each of them: always on what was there before it."""
    model, x = Function(OVERWRITING[how], p=(5,)), torch.randn(B, 5)
    expected = dither.clipped_sum(model, lambda: loss_of(model(x[1:])), max_grad_norm=0.5, strategy=strategy)
    x[0] = float("nan")
    result = dither.clipped_sum(model, lambda: loss_of(model(x)), max_grad_norm=0.5, strategy=strategy)
    assert result.dropped == 1
    assert oracle.relative_error(result.gradients, expected.gradients) <= 1e-10
