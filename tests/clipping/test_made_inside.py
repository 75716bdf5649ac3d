"""Tensors made of lists and arrays inside the loss function are the examples', and so is what they are written into."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dither
from clipping.test_exactness import assert_exact, assert_refused
from dither import errors

pytestmark = pytest.mark.usefixtures("double_precision")
B = 8


def _out(x):
    made = torch.empty(B, 5)
    torch.mul(x, 2.0, out=made)
    return made


def _other_view(x):
    made = torch.zeros(B, 5)
    shown = made.view(-1, 5)
    made.copy_(x)
    return shown


def _array(x):
    made = torch.zeros(B, 5)
    made.numpy()[:] = x.numpy()
    return made


MADE = {
    "torch.tensor": lambda x: torch.tensor(x.tolist()),
    "torch.as_tensor": lambda x: torch.as_tensor(x.numpy()),
    "torch.asarray": lambda x: torch.asarray(x.numpy().copy()),
    "new_tensor": lambda x: torch.zeros(1).new_tensor(x.tolist()),
    "out=": _out,
    "another view": _other_view,
    "array": _array,
}


@pytest.mark.parametrize("how", MADE)
def test_statistics_over_a_batch_that_is_made_inside_are_refused(how):
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 2))
    x, y = torch.randn(B, 5), torch.randint(0, 2, (B,))
    assert_refused(
        model, lambda: F.cross_entropy(model(MADE[how](x)), y, reduction="none"), errors.CoupledExamplesError
    )


@pytest.mark.parametrize("how", MADE)
def test_means_over_a_batch_that_is_made_inside_are_refused(how):
    model, x = nn.Linear(5, 4), torch.randn(B, 5)

    def loss_fn():
        h = model(MADE[how](x))
        return (h - h.mean(0)).square().sum(1)

    assert_refused(model, loss_fn, errors.CoupledExamplesError)


@pytest.mark.parametrize("how", MADE)
def test_batches_and_targets_that_are_made_inside_are_exact(how):
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2))
    x, y = torch.randn(B, 5), torch.randint(0, 2, (B,)).tolist()
    assert_exact(model, lambda: F.cross_entropy(model(MADE[how](x)), torch.tensor(y), reduction="none"))


def test_ids_of_a_table_that_renormalises_are_refused():
    model, ids = nn.Embedding(5, 3, max_norm=1.0), [[0, 1], [2, 3], [1, 1], [4, 0]]
    assert_refused(model, lambda: model(torch.tensor(ids)).flatten(1).square().sum(1), errors.UnsupportedOpError)


def test_numbers_and_declared_lists_are_constants():
    model, x = nn.Linear(5, 5), torch.randn(4, 5)

    def loss_fn():
        scale = torch.tensor(0.5) * model.weight
        order = dither.constant(torch.tensor([4, 3, 2, 1, 0]))
        return (x @ scale[order]).square().sum(1)

    assert_exact(model, loss_fn)


def test_a_parameter_used_with_out_is_refused():
    model, x = nn.Linear(5, 4), torch.randn(B, 5)
    assert_refused(
        model,
        lambda: torch.matmul(x, model.weight.T, out=torch.empty(B, 4)).square().sum(1),
        errors.UnsupportedOpError,
    )


def test_lists_that_meet_no_parameter_are_as_good_as_constants():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(5, 5)
            self.register_buffer("frequencies", torch.ones(5))

        def forward(self, x):
            self.frequencies = torch.tensor([1.0, 0.5, 0.25, 2.0, 3.0]) * 2  # as scaled rotary embeddings do
            return self.linear(x) * self.frequencies.cos()

    model, x = Scaled(), torch.randn(B, 5)
    assert_exact(model, lambda: model(x).square().sum(1))
