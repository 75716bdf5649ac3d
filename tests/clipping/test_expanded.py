"""A parameter expanded over the examples: exact, and taken from each example's own rows."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dither
import oracle
from clipping.test_exactness import STRATEGIES, Function, assert_exact, loss_of
from dither.clipping.expanded import expansion_of
from dither.clipping.recording import Recording

pytestmark = pytest.mark.usefixtures("double_precision")
B, T, D = 4, 3, 6


def class_token(x, w, token):
    return F.linear(torch.cat([token.expand(len(x), -1, -1), x], 1), w)


def positions(x, w, token):
    return F.linear(x + token.expand(len(x), *x.shape[1:]), w)


def scales(x, w, token):
    return F.linear(x * token.expand_as(x).tanh(), w) + F.linear(x * token.expand_as(x), w)


def computed(x, w, token):
    return F.linear(torch.maximum(x, (token * token.square().sum()).expand_as(x)), w)


def added_axis(x, w, token):
    return F.linear(x + token[0, 0].expand(len(x), x.shape[1], -1), w)


def time_first(x, w, token):
    return F.linear((x.transpose(0, 1) + token.transpose(0, 1).expand(x.shape[1], len(x), -1)).transpose(0, 1), w)


def flattened(x, w, token):
    rows = x.flatten(0, 1)
    return F.linear(rows * token[0].expand(len(rows), -1), w).view(x.shape)


def time_first_flattened(x, w, token):
    rows = x.transpose(0, 1).flatten(0, 1)
    return F.linear(rows * token[0].expand(len(rows), -1), w).view(x.shape[1], len(x), -1).transpose(0, 1)


def hooked(x, w, token):
    expanded = token.expand_as(x)
    expanded.register_hook(lambda g: g * 3)
    return F.linear(x + expanded, w)


TAKEN = [class_token, positions, scales, computed, added_axis, time_first, flattened, time_first_flattened]


def joined_along_the_examples(x, w, token):
    both = torch.cat([token.expand(len(x), *x.shape[1:]), x], 0)
    return F.linear(both, w)[len(x) :] + F.linear(both, w)[: len(x)] * x


def model_of(body, rows=1):
    return Function(body, w=(D, D), token=(1, rows, D)), torch.randn(B, T, D)


@pytest.mark.parametrize("body", [*TAKEN, hooked, joined_along_the_examples])
def test_exact(body):
    model, x = model_of(body)
    assert_exact(model, lambda: loss_of(model(x)))


@pytest.mark.parametrize("body", [*TAKEN, hooked])
def test_taken_from_own_rows_where_that_is_certain(body):
    model, x = model_of(body)
    recording = Recording(model, lambda: loss_of(model(x)))
    expanded = [use for use in recording.tape.uses if use.parameter.dim() and use.name not in ("w", "token")]
    found = [expansion_of(use) is not None for use in expanded if use.parameter.grad_fn.name() == "ExpandBackward0"]
    assert found
    assert not any(found) if body is hooked else all(found)


def test_a_table_with_a_row_for_each_place_is_no_expansion():
    model = Function(lambda x, table: x * (table * 2), table=(B, T, D))
    x = torch.randn(B, T, D)
    recording = Recording(model, lambda: loss_of(model(x)))
    assert all(expansion_of(use) is None for use in recording.tape.uses)
    assert_exact(model, lambda: loss_of(model(x)))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_example_that_is_not_finite_is_left_out(strategy, value):
    model, x = model_of(class_token)
    x[2] = value
    others = torch.tensor([0, 1, 3])
    truth = oracle.per_example_gradients(model, lambda: loss_of(model(x[others])))
    result = dither.clipped_sum(model, lambda: loss_of(model(x)), strategy=strategy)
    assert result.dropped == 1
    assert oracle.relative_error(result.gradients, oracle.clipped_sum(truth, 1.0)) <= 1e-10


def test_memory_grows_with_the_examples_not_with_their_square():
    class Token(nn.Module):
        def __init__(self):
            super().__init__()
            self.token = nn.Parameter(torch.randn(1, 16, 64))

        def forward(self, x):
            return x + self.token.expand(len(x), -1, -1)

    def largest(batch):
        model, x = Token(), torch.randn(batch, 16, 64)
        made = []

        class Watch(torch.utils._python_dispatch.TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                output = func(*args, **(kwargs or {}))
                made.extend(t.untyped_storage().nbytes() for t in [output] if isinstance(t, torch.Tensor))
                return output

        for _ in range(5):  # the proofs aside
            dither.clipped_sum(model, lambda: model(x).square().flatten(1).sum(1))
        with Watch():
            dither.clipped_sum(model, lambda: model(x).square().flatten(1).sum(1))
        return max(made)

    assert largest(64) <= 64 * 16 * 64 * 8  # one output's
