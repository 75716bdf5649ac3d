"""The first table of trust.md: every row exact in every strategy, or refused by a named error.

`test_trust_index.py` lists the rows and checks that each has its tests.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import dither
import oracle
from clipping.test_exactness import (
    STRATEGIES,
    Function,
    assert_exact,
    assert_refused,
    loss_of,
)
from dither import errors

pytestmark = pytest.mark.usefixtures("double_precision")
each_strategy = pytest.mark.parametrize("strategy", STRATEGIES)


class Several(nn.Module):
    """Raw parameters on the top module, several inputs, an optional one, ints, bools and None, dropout inside."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.randn(4))
        self.first = nn.Linear(3, 4)
        self.second = nn.Linear(3, 4)

    def forward(self, x, other=None, *, repeat: int = 1, flip: bool = False, note: str | None = None, drop: float = 0):
        h = self.first(x) * self.scale
        if other is not None:
            h = h + self.second(other)
        h = F.dropout(h, drop, self.training)
        for _ in range(repeat):
            h = h.tanh()
        return {"out": (h.flip(-1) if flip else h, note), "rest": [None, x]}


def several():
    return Several(), torch.randn(5, 3), torch.randn(5, 3)


# --- exact ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5, 2, 6, 3), (5, 5, 5, 3), (5, 2, 2, 2, 3)])
def test_linear_on_four_dimensions_and_more(shape):
    model, x = nn.Linear(3, 4), torch.randn(shape)
    assert_exact(model, lambda: loss_of(model(x)))


def test_linear_on_four_dimensions_after_three():
    """Opacus keeps the norm of the three-dimensional step."""
    model = nn.Linear(3, 4)
    for shape in ((5, 6, 3), (5, 2, 6, 3), (5, 6, 3)):
        x = torch.randn(shape)
        assert_exact(model, lambda x=x: loss_of(model(x)))


def test_parameter_on_the_top_module_with_several_inputs():
    model, x, other = several()
    assert_exact(model, lambda: loss_of(model(x, other)["out"][0]))


def test_keyword_arguments_alone():
    model, x, other = several()
    assert_exact(model, lambda: loss_of(model(other=other, x=x)["out"][0]))


def test_optional_second_tensor_given_left_out_and_given_again():
    model, x, other = several()
    for second in (None, other, None, other):
        assert_exact(model, lambda second=second: loss_of(model(x, other=second)["out"][0]))


def test_integers_booleans_none_and_strings():
    model, x, other = several()
    assert_exact(model, lambda: loss_of(model(x, other, repeat=3, flip=True, note="a")["out"][0]))
    assert_exact(model, lambda: loss_of(model(x, None, repeat=0, flip=False, note=None)["out"][0]))


@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
def test_tied_weights(scale):
    table, head = nn.Embedding(7, 4), nn.Linear(4, 7)
    head.weight = table.weight
    model, ids = nn.ModuleList([table, head]), torch.randint(7, (5, 6))
    assert_exact(model, lambda: loss_of(head(table(ids).tanh())) * scale)
    assert len(dither.clipped_sum(model, lambda: loss_of(head(table(ids).tanh()))).gradients) == 2  # tied: one entry


def test_dropout_inside_a_custom_module_with_the_mask_that_was_drawn():
    model, x, other = several()
    assert_exact(model, lambda: loss_of(model(x, other, drop=0.5)["out"][0]))
    model.scale.data.fill_(1.0)
    result = dither.per_example_gradients(model, lambda: model(x, drop=0.5)["out"][0].sum(1))
    dropped = result["first.bias"] == 0
    assert dropped.any() and not dropped.all()  # a mask was drawn, one for each example


def test_eval_then_train():
    model, x, other = several()
    for training in (False, True, False, True):
        model.train(training)
        assert_exact(model, lambda: loss_of(model(x, other, drop=0.5)["out"][0]))


@each_strategy
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("position", [0, 2, 4])
def test_an_example_that_is_not_finite_is_dropped_and_counted(strategy, value, position):
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.LayerNorm(4), nn.Conv1d(6, 2, 2))
    x = torch.randn(5, 6, 3)
    others = torch.cat([x[:position], x[position + 1 :]])
    x[position, 1] = value
    expected = dither.clipped_sum(model, lambda: loss_of(model(others)), strategy=strategy)
    result = dither.clipped_sum(model, lambda: loss_of(model(x)), strategy=strategy)
    assert result.dropped == 1 and not torch.isfinite(result.norms[position])
    assert expected.dropped == 0 and oracle.relative_error(result.gradients, expected.gradients) <= 1e-10


@each_strategy
def test_parameter_unused_on_a_later_step_contributes_zero(strategy):
    model, x, other = several()
    first = dither.clipped_sum(model, lambda: loss_of(model(x, other)["out"][0]), strategy=strategy)
    assert first.gradients["second.weight"].any()
    later = dither.clipped_sum(model, lambda: loss_of(model(x)["out"][0]), strategy=strategy)
    assert not later.gradients["second.weight"].any() and not later.gradients["second.bias"].any()
    truth = oracle.per_example_gradients(model, lambda: loss_of(model(x)["out"][0]))
    torch.testing.assert_close(later.norms, oracle.norms(truth))


@pytest.mark.parametrize("output", ["tuple", "dict", "list", "nested"])
def test_tuple_and_dict_outputs_of_custom_modules(output):
    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x):
            a, b = self.a(x), self.b(x)
            return {"tuple": (a, b), "dict": {0: a, 1: b}, "list": [a, b], "nested": ({"a": a}, [None, (b, 3)])}[output]

    model, x = nn.Sequential(Inner()), torch.randn(5, 3)

    def loss_fn():
        found = model(x)
        a, b = (found[0]["a"], found[1][1][0]) if output == "nested" else (found[0], found[1])
        return loss_of(a) + loss_of(b)

    assert_exact(model, loss_fn)


def test_module_call_and_functional_on_the_same_weight():
    layer, x = nn.Linear(4, 4), torch.randn(5, 3, 4)
    assert_exact(layer, lambda: loss_of(F.linear(layer(x).tanh(), layer.weight)))
    assert_exact(layer, lambda: loss_of(layer(x) @ layer.weight.T + layer.bias))


@pytest.mark.parametrize("of", ["input", "model", "both"])
def test_convolution_on_channels_last(of):
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU(inplace=True), nn.Conv2d(6, 3, 2, stride=2, padding=1))
    x = torch.randn(4, 4, 6, 6)
    if of in ("model", "both"):
        model = model.to(memory_format=torch.channels_last)
    if of in ("input", "both"):
        x = x.contiguous(memory_format=torch.channels_last)
    assert_exact(model, lambda: loss_of(model(x)))


def test_parameter_unfrozen_and_frozen_later():
    model, x, other = several()
    for trainable in (False, True, False):
        model.first.weight.requires_grad_(trainable)
        assert_exact(model, lambda: loss_of(model(x, other)["out"][0]))
        result = dither.clipped_sum(model, lambda: loss_of(model(x, other)["out"][0]))
        assert ("first.weight" in result.gradients) == trainable


def test_layer_added_later():
    model, x, _ = several()
    assert_exact(model, lambda: loss_of(model(x)["out"][0]))
    model.extra = nn.Linear(4, 2)
    assert_exact(model, lambda: loss_of(model.extra(model(x)["out"][0])))
    del model.extra
    assert_exact(model, lambda: loss_of(model(x)["out"][0]))


@each_strategy
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpoints_are_exact(reentrant, strategy):
    model, x = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)), torch.randn(4, 3, requires_grad=True)
    truth = oracle.clipped_sum(oracle.per_example_gradients(model, lambda: loss_of(model(x))), 0.5)
    result = dither.clipped_sum(
        model,
        lambda: loss_of(checkpoint(model, x, use_reentrant=reentrant)),
        max_grad_norm=0.5,
        strategy=strategy,
    )
    assert oracle.relative_error(result.gradients, truth) <= 1e-10
    assert all(p.grad is None for p in model.parameters()) and x.grad is None


# --- refused or accumulated ------------------------------------------------------------------------


@pytest.mark.parametrize("tracked", [False, True])
def test_batch_statistics_in_the_model_are_refused(tracked):
    x = torch.randn(4, 3, 5, 5)
    norm = nn.BatchNorm2d(4, track_running_stats=tracked)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.Conv2d(4, 2, 1))
    assert_refused(model, lambda: loss_of(model(x)), errors.CoupledExamplesError, match="batch normalisation")
    if tracked:
        assert not norm.running_mean.any()  # refused before the data reached it


def test_batch_statistics_without_a_batch_norm_are_refused():
    model = Function(lambda x, w: (h := x @ w) / h.std(0), w=(3, 2))
    assert_refused(model, lambda: loss_of(model(torch.randn(4, 3))), errors.CoupledExamplesError)


def test_batch_statistics_in_the_loss_are_refused():
    model, x = nn.Linear(3, 2), torch.randn(4, 3)
    for coupled in (lambda y: y - y.mean(0), lambda y: y / y.norm(), lambda y: y.softmax(0), lambda y: y.cumsum(0)):
        assert_refused(model, lambda f=coupled: loss_of(f(model(x))), errors.CoupledExamplesError)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_scalar_loss_is_refused(reduction):
    model, x, y = nn.Linear(3, 2), torch.randn(4, 3), torch.randint(2, (4,))
    assert_refused(
        model,
        lambda: F.cross_entropy(model(x), y, reduction=reduction),
        errors.LossShapeError,
        match="one loss per example",
    )


@each_strategy
def test_second_pass_before_the_step_accumulates(strategy):
    """`into` adds: two micro-batches are one batch, and nothing of the first is lost or clipped again."""
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(7, 5, 3)
    whole = dither.clipped_sum(model, lambda: loss_of(model(x)), max_grad_norm=0.5, strategy=strategy)
    sums = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for part in (x[:4], x[4:4], x[4:]):
        dither.clipped_sum(model, lambda p=part: loss_of(model(p)), max_grad_norm=0.5, strategy=strategy, into=sums)
    assert oracle.relative_error(sums, whole.gradients) <= 1e-12
    again = dither.clipped_sum(model, lambda: loss_of(model(x)), max_grad_norm=0.5, strategy=strategy, into=sums)
    assert again.gradients is sums
    doubled = {name: 2 * g for name, g in whole.gradients.items()}
    assert oracle.relative_error(sums, doubled) <= 1e-12
