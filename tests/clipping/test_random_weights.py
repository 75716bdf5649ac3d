"""Weights that meet random numbers: a constant of the batch, unless examples are behind the numbers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from clipping.test_exactness import Function, assert_exact, assert_refused, loss_of
from dither import errors

pytestmark = pytest.mark.usefixtures("double_precision")
B, T = 4, 3


def _rank_dropout(w, x):
    drop = (torch.rand(5) > 0.3).to(w.dtype).view(-1, 1)
    drop /= drop.mean() + 0.1
    w *= drop


def _dropped_connections(w, x):
    w[torch.rand(5, 5) < 0.3] = 0


def _noise(w, x):
    w.add_(torch.randn(5, 5) * torch.full((), 0.1))


def _noise_in_rows(w, x):
    w[1:3].mul_(torch.empty(2, 5).normal_())


NUMBERS = {"rank dropout": _rank_dropout, "connections": _dropped_connections, "noise": _noise, "rows": _noise_in_rows}


@pytest.mark.parametrize("how", NUMBERS)
@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_computed_weight_times_random_numbers(how, checkpointed):
    def layer(x, w):
        w = w @ w.T
        NUMBERS[how](w, x)
        return F.linear(x, w).tanh()

    def body(x, w):
        h = checkpoint(layer, x, w, use_reentrant=False) if checkpointed else layer(x, w)
        return F.linear(h, w)

    model, x = Function(body, w=(5, 5)), torch.randn(B, T, 5)
    assert_exact(model, lambda: loss_of(model(x)))


DROPPED = {
    "w * mask": lambda w, mask: w * mask,
    "mask * w": lambda w, mask: mask * w,
    "rows": lambda w, mask: w * mask[:, :1],
    "masked_fill": lambda w, mask: w.masked_fill(mask, 0),
    "where": lambda w, mask: torch.where(mask, w, 0),
    "noise": lambda w, mask: w - torch.randn(5, 5),
    "numbers times a weight, in place": lambda w, mask: torch.rand(5, 5).mul_(w),
}


@pytest.mark.parametrize("how", DROPPED)
@pytest.mark.parametrize("batch", [1, B, 5])
def test_dropped_connections(how, batch):
    model = Function(lambda x, w: F.linear(x, DROPPED[how](w, torch.rand(5, 5) < 0.5)).tanh() @ w, w=(5, 5))
    x = torch.randn(batch, 5)
    assert_exact(model, lambda: loss_of(model(x)))


def test_dropped_connections_hide_no_coupling():
    def body(x, w, mixed):
        h = F.linear(x, w * (torch.rand(5, 5) < 0.5))
        return F.linear(h - h.mean(0) if mixed == "before" else h, w * (h > 0 if mixed == "by examples" else 1))

    for mixed, batch in (("before", B), ("by examples", 5)):
        model, x = Function(lambda x, w, mixed=mixed: body(x, w, mixed), w=(5, 5)), torch.randn(batch, 5)
        assert_refused(model, lambda x=x, model=model: loss_of(model(x)), errors.CaptureError)


def _from_examples(w, x):
    w *= (x.mean(0) > 0).to(w.dtype)


def _drawn_by_examples(w, x):
    w *= torch.bernoulli(x.mean(0).sigmoid())


def _examples_among_the_numbers(w, x):
    drop = torch.rand(5)
    drop += x.mean(0)
    w *= drop


def _numbers_overwritten(w, x):
    drop = torch.rand(5)
    drop.view(1, 5).copy_(x.mean(0, keepdim=True))
    w *= drop


def _numbers_overwritten_in_a_detached_one(w, x):
    drop = torch.rand(5)
    drop[:2].detach().mul_(x.mean())
    w *= drop.view(1, 5)


@pytest.mark.parametrize(
    "change",
    [
        _from_examples,
        _drawn_by_examples,
        _examples_among_the_numbers,
        _numbers_overwritten,
        _numbers_overwritten_in_a_detached_one,
    ],
)
def test_a_computed_weight_times_what_examples_gave_is_refused(change):
    def body(x, w):
        w = w @ w.T
        change(w, x)
        return F.linear(x, w)

    model, x = Function(body, w=(5, 5)), torch.randn(B, 5)
    assert_refused(model, lambda: loss_of(model(x)), errors.UnsupportedOpError, match="in place")


def test_noise_of_each_example_is_no_constant():
    """A generator: numbers that are the examples' own meet the first parameter."""

    def body(w, v):
        return F.linear(F.linear(torch.randn(B, 5), w).tanh(), v)

    model = Function(body, w=(5, 5), v=(3, 5))
    assert_exact(model, lambda: loss_of(model()))
    mixing = Function(lambda w, v: F.linear((h := F.linear(torch.randn(B, 5), w)) - h.mean(0), v), w=(5, 5), v=(3, 5))
    assert_refused(mixing, lambda: loss_of(mixing()), errors.CoupledExamplesError)
