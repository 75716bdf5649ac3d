"""Declared inputs, rows in no regular order, and constants that outlive a recording."""

from __future__ import annotations

import functools
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import dither
from clipping.test_exactness import assert_exact
from dither import errors

pytestmark = pytest.mark.usefixtures("double_precision")
B = 4


class Conditioned(nn.Module):
    """Reads its conditioning from an attribute."""

    def __init__(self):
        super().__init__()
        self.inner, self.of_condition = nn.Linear(3, 4), nn.Linear(5, 4)
        self.condition = None

    def forward(self, x):
        return self.inner(x) * self.of_condition(self.condition).unsqueeze(1)


def test_conditioning_by_an_attribute():
    model, x = Conditioned(), torch.randn(B, 6, 3)
    for declare in (dither.batched, lambda c: c):
        model.condition = declare(torch.randn(B, 5))
        assert_exact(model, lambda: model(x).square().flatten(1).sum(1))
    model.condition = dither.constant(torch.randn(1, 5))
    assert_exact(model, lambda: model(x).square().flatten(1).sum(1))


def test_a_mixture_before_the_first_parameter_is_refused_where_the_input_is_declared():
    model, x = nn.Linear(3, 2), dither.batched(torch.randn(B, 3))
    with pytest.raises(errors.CoupledExamplesError):
        dither.clipped_sum(model, lambda: model(x - x.mean(0)).square().sum(1))
    with pytest.raises(errors.CoupledExamplesError):
        dither.clipped_sum(model, lambda: model(x[[1, 0, 3, 2]]).square().sum(1))
    assert_exact(model, lambda: model(x - x.mean(1, keepdim=True)).square().sum(1))


def test_an_axis_that_is_declared_anew_is_proved_anew():
    model, square = Conditioned().of_condition, torch.randn(5, 5)
    for axis in (0, 0, 0):  # proved in the first pass and the second, then remembered
        x = dither.batched(square, axis)
        assert_exact(model, lambda x=x: model(x).square().sum(1))
    x = dither.batched(square, 1)
    with pytest.raises(errors.CoupledExamplesError):
        dither.clipped_sum(model, lambda: model(x).square().sum(1))


def test_a_private_training_follows_the_batch():
    model = nn.Linear(3, 1)
    data = [(torch.randn(3), torch.randn(1)) for _ in range(32)]

    def mixing(model, batch):
        x, y = batch
        return (model((x - x.mean(0)) / x.std(0)) - y).square().sum(1)

    training = dither.PrivateTraining(
        model, torch.optim.SGD(model.parameters(), lr=0.1), data, mixing, expected_batch_size=16, steps=3, delta=1e-2
    )
    with pytest.raises(errors.CoupledExamplesError):
        next(iter(training))
    assert training.ledger.steps == 0


def test_a_declaration_of_another_batch_is_refused():
    model, x = Conditioned(), torch.randn(B, 6, 3)
    model.condition = dither.batched(torch.randn(B + 1, 5))
    with pytest.raises((errors.ExampleAxisError, RuntimeError)):
        dither.clipped_sum(model, lambda: model(x).square().flatten(1).sum(1))
    table = dither.batched(torch.randn(B + 1, 3))
    with pytest.raises(errors.ExampleAxisError, match="declared batched"):
        dither.clipped_sum(model.inner, lambda: model.inner(x + table.sum(0)).square().flatten(1).sum(1))
    with pytest.raises(errors.ConfigurationError, match="axis"):
        dither.batched(torch.zeros(()))


@pytest.mark.parametrize("axis", [0, 1])
def test_time_first_declarations(axis):
    model, x = nn.Linear(3, 2), torch.randn(B, B, 3)
    declared = dither.batched(x if axis == 0 else x.transpose(0, 1), axis)
    assert_exact(model, lambda: model(declared).transpose(0, axis).square().flatten(1).sum(1))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("source", ["declared", "embedded", "raw"])
def test_packed_sequences(kind, source):
    model = nn.ModuleDict({"embed": nn.Linear(3, 3), "recurrent": kind(3, 4, 2, batch_first=True, bidirectional=True)})
    x, lengths = torch.randn(B, 6, 3), torch.tensor([3, 6, 1, 4])
    x = dither.batched(x) if source == "declared" else x

    def loss_fn():
        rows = model["embed"](x) if source == "embedded" else x
        packed = pack_padded_sequence(rows, lengths, batch_first=True, enforce_sorted=False)
        output, last = model["recurrent"](packed)
        padded, _ = pad_packed_sequence(output, batch_first=True)
        last = last[0] if isinstance(last, tuple) else last
        return padded.square().flatten(1).sum(1) + last.transpose(0, 1).cos().flatten(1).sum(1)

    if source == "raw":
        with pytest.raises(errors.CoupledExamplesError, match=r"dither\.batched"):
            dither.clipped_sum(model, loss_fn)
    else:
        assert_exact(model, loss_fn)


def test_tokens_sent_to_experts():
    model = nn.ModuleDict(
        {
            "embed": nn.Embedding(9, 4),
            "route": nn.Linear(4, 3),
            "experts": nn.ModuleList(nn.Linear(4, 4) for _ in "abc"),
        }
    )
    ids = torch.randint(9, (B, 5))

    def loss_fn():
        h = model["embed"](ids).flatten(0, 1)
        gate, expert = model["route"](h).softmax(-1).max(-1)
        out = torch.zeros_like(h)
        for number, layer in enumerate(model["experts"]):
            chosen = (expert == number).nonzero().flatten()
            out = out.index_add(0, chosen, F.gelu(layer(h[chosen])) * gate[chosen, None])
        return out.view(B, 5, 4).square().flatten(1).sum(1)

    assert_exact(model, loss_fn)


def test_a_cached_index_stays_a_constant():
    class Biased(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.randn(9, 5))

        @functools.lru_cache(maxsize=2)  # noqa: B019
        def index(self, size):
            return torch.arange(size).flip(0)

        def forward(self, x):
            return x + self.table[self.index(x.shape[1])]

    model, x = Biased(), torch.randn(B, 6, 5)
    for _ in range(3):
        dither.clipped_sum(model, lambda: model(x).square().flatten(1).sum(1))
    assert_exact(model, lambda: model(x).square().flatten(1).sum(1))


def test_declarations_inside_the_loss():
    model, x, table = Conditioned(), torch.randn(B, 6, 3), torch.randn(1, 5)

    def loss_fn():
        model.condition = dither.constant(table.clone())
        return model(dither.batched(x)).square().flatten(1).sum(1)

    assert_exact(model, loss_fn)

    def mixing():
        rows = dither.batched(x)
        model.condition = dither.constant(table.clone())
        return model(rows - rows.mean(0)).square().flatten(1).sum(1)

    with pytest.raises(errors.CoupledExamplesError):
        dither.clipped_sum(model, mixing)


@pytest.mark.parametrize("where", ["attribute", "list", "dict"])
def test_a_refusal_names_the_tensors_that_a_module_holds(where):
    class Looked(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.table = nn.Linear(3, 3), nn.Parameter(torch.randn(9, 3))
            index = torch.arange(7)
            self.held = {"attribute": index, "list": [index], "dict": {"default": index}}[where]

        def index(self):
            return self.held if where == "attribute" else self.held[0 if where == "list" else "default"]

        def forward(self, x):
            return self.layer(x) + self.table[self.index()].sum(0)

    written = {"attribute": "held", "list": "held[0]", "dict": "held['default']"}[where]
    model, x = nn.Sequential(Looked()), torch.randn(B, 3)
    with pytest.raises(errors.ExampleAxisError, match=re.escape(f"holds 0.{written}, no buffer")):
        dither.clipped_sum(model, lambda: model(x).square().sum(1))
    declared = dither.constant(torch.arange(7))
    model[0].held = {"attribute": declared, "list": [declared], "dict": {"default": declared}}[where]
    assert_exact(model, lambda: model(x).square().sum(1))


def test_conditioning_of_this_batch_is_not_taken_for_a_constant():
    """A statistic of the batch, and one entry for each example that the model mixes: refused, the attribute named."""
    model, x = Conditioned(), torch.randn(B, 6, 3)
    model.condition = torch.randn(B, 5).mean(0, keepdim=True)
    with pytest.raises(errors.CaptureError, match="holds condition, no buffer"):
        dither.clipped_sum(model, lambda: model(x).square().flatten(1).sum(1))
    model.condition = torch.randn(B, 5)
    with pytest.raises(errors.CoupledExamplesError, match="holds condition, no buffer"):
        dither.clipped_sum(
            model, lambda: (model.inner(x).sum(1) * model.of_condition(model.condition).mean(0)).square().sum(1)
        )
