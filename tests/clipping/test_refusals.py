"""What the public functions refuse, by name: coupled examples, wrong losses, gradients around the recorder, bad use."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dither
import oracle
from clipping.test_exactness import STRATEGIES, assert_exact_or_refused, assert_refused, loss_of
from dither import errors

pytestmark = pytest.mark.usefixtures("double_precision")


@pytest.mark.parametrize("pair", [(i, j) for i in range(6) for j in range(6) if i != j])
def test_one_example_that_reaches_into_another_is_refused(pair):
    model, x = nn.Linear(3, 2), torch.randn(6, 3)
    i, j = pair

    def loss_fn():
        losses = model(x).square().sum(1)
        return losses + F.one_hot(torch.tensor(i), 6) * losses[j] * 1e-30

    with pytest.raises(errors.CoupledExamplesError):
        dither.clipped_sum(model, loss_fn)


def test_coupling_behind_an_operation_whose_backward_hides_nan_is_refused():
    model, x = nn.Linear(3, 2), torch.randn(4, 3)

    def loss_fn():
        h = model(x)
        return (h + torch.logcumsumexp(h, 0)).square().sum(1)

    assert_refused(model, loss_fn, errors.CoupledExamplesError)


def test_bags_that_divide_by_counts_over_the_batch_are_refused():
    table, ids = nn.Embedding(3, 4), torch.randint(0, 3, (4, 5))
    starts = torch.arange(0, 20, 5)
    assert_refused(
        table,
        lambda: torch.embedding_bag(table.weight, ids.flatten(), starts, True)[0].square().sum(1),
        errors.UnsupportedOpError,
    )


def test_coupling_behind_a_weight_that_is_zero_is_refused():
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2, track_running_stats=False), nn.Linear(2, 2))
    nn.init.zeros_(model[2].weight)
    x = torch.randn(4, 3)
    assert_refused(model, lambda: model(x).sum(1), errors.CoupledExamplesError)


@pytest.mark.parametrize("reduce", [lambda x: x.mean(), lambda x: x, lambda x: None, lambda x: x.sum(1).long()])
def test_a_loss_that_is_not_one_number_per_example_is_refused(reduce):
    model, x = nn.Linear(3, 2), torch.randn(4, 3)
    assert_refused(model, lambda: reduce(model(x)), errors.LossShapeError, match="one loss per example")


@pytest.mark.parametrize("reorder", [lambda x: x.sort().values, lambda x: x.topk(4).values])
def test_losses_sorted_over_the_batch_are_exact_or_refused(reorder):
    """Each loss is still one example's own, in an order that the data chose."""
    model, x = nn.Linear(3, 2), torch.randn(4, 3)
    for rows in ([0, 1, 2, 3], [3, 1, 0, 2]):
        assert_exact_or_refused(model, lambda rows=rows: reorder(loss_of(model(x[rows]))))


CHOSEN = {
    "the largest": lambda losses: losses.topk(3).values,
    "below the median": lambda losses: losses[losses.detach().argsort()[:3]],
    "running maximum": lambda losses: losses.cummax(0).values,
}


@pytest.mark.parametrize("choice", CHOSEN)
def test_losses_chosen_by_comparison_are_refused(choice):
    """Which example counts depends on the others: hard-example mining, trimmed losses."""
    model, x = nn.Linear(3, 2), torch.randn(6, 3)
    assert_refused(model, lambda: CHOSEN[choice](loss_of(model(x))), errors.CaptureError)


NEGATIVES = {
    "rolled": lambda h: h.roll(1, 0),
    "reversed": lambda h: h.flip(0),
    "shuffled": lambda h: h[torch.tensor([2, 0, 1, 5, 3, 4])],
    "from a Python list": lambda h: torch.stack([h[i] for i in (1, 0, 3, 2, 5, 4)]),
}


@pytest.mark.parametrize("how", NEGATIVES)
def test_negatives_taken_from_other_examples_are_refused(how):
    """Every row has one loss, but a loss has rows of two examples: removing one moves the sum by up to 3.4 C."""
    model = nn.ModuleList([nn.Linear(5, 5), nn.Linear(5, 5)])
    x, other = torch.randn(6, 5), torch.randn(6, 5)
    assert_refused(model, lambda: loss_of(model[0](x) * NEGATIVES[how](model[1](other))), errors.CaptureError)


class Hidden(torch.autograd.Function):
    """A product whose operands torch's function mode may not see."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x @ w

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return g @ w.T, x.T @ g


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_gradient_around_the_recorder_is_exact_or_refused_and_leaves_no_trace(strategy):
    model, x = nn.Linear(3, 3), torch.randn(4, 3)

    def loss_fn():
        return loss_of(Hidden.apply(model(x), model.weight))

    truth = oracle.clipped_sum(oracle.per_example_gradients(model, loss_fn), 1.0)
    model.weight.grad = torch.ones(3, 3)
    try:
        result = dither.clipped_sum(model, loss_fn, strategy=strategy)
    except errors.CaptureError as refusal:
        assert "weight" in str(refusal)
    else:
        assert oracle.relative_error(result.gradients, truth) <= 1e-10
    assert torch.equal(model.weight.grad, torch.ones(3, 3)) and model.bias.grad is None


@pytest.mark.parametrize("transform", ["vmap", "jvp"])
def test_function_transforms_inside_the_loss_are_refused(transform):
    model, x = nn.Linear(5, 3), torch.randn(4, 5)
    losses = {
        "vmap": lambda: torch.vmap(lambda row: loss_of(model(row).unsqueeze(0)).sum())(x),
        "jvp": lambda: loss_of(torch.func.jvp(model, (x,), (torch.ones_like(x),))[1]),
    }
    assert_refused(model, losses[transform], errors.UnsupportedOpError, match="torch.func")


def test_a_forward_outside_the_loss_function_is_refused():
    model, x = nn.Linear(3, 2), torch.randn(4, 3)
    stale = model(x)
    assert_refused(model, lambda: stale.sum(1), errors.CoverageError)


@pytest.mark.parametrize("compiled", [torch.jit.script, lambda model: torch.jit.trace(model, torch.randn(4, 3))])
@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_torchscript_escapes_the_recorder_and_is_refused(compiled):
    model = compiled(nn.Linear(3, 2))
    assert_refused(model, lambda: loss_of(model(torch.randn(4, 3))), errors.CoverageError, match="outside the recorder")


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("change", [lambda h: h.mul_(2), lambda h: h.detach().mul_(2), lambda h: h[0].zero_()])
def test_a_saved_input_changed_in_place_is_refused(strategy, change):
    model, x = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)]), torch.randn(4, 3)

    def loss_fn():
        h = model[0](x) * 1
        y = model[1](h)
        with torch.no_grad():
            change(h)
        return y.sum(1)

    with pytest.raises(errors.SavedInputChangedError, match="in place"):
        dither.clipped_sum(model, loss_fn, strategy=strategy)


def test_a_parameter_changed_in_place_between_its_uses_is_refused():
    model, x = nn.Linear(3, 3), torch.randn(4, 3)

    def loss_fn():
        y = model(x).tanh()
        with torch.no_grad():
            model.weight.clamp_(-0.1, 0.1)
        return loss_of(model(y))

    assert_refused(model, loss_fn, errors.SavedInputChangedError)


def test_nested_recordings_and_inner_backward_are_refused():
    model, x = nn.Linear(3, 2), torch.randn(4, 3)
    for inner in (
        lambda: dither.clipped_sum(model, lambda: model(x).sum(1)).norms,
        lambda: torch.autograd.grad(model(x).sum(), model.weight)[0].sum(1),
        lambda: model(x).sum().backward(),
    ):
        assert_refused(model, inner, errors.NestedRecorderError)
    assert dither.clipped_sum(model, lambda: model(x).sum(1)).norms.shape == (4,)  # the recorder is free again


def test_an_error_of_the_loss_function_passes_and_leaves_the_recorder_free():
    model, x = nn.Linear(3, 2), torch.randn(4, 3)

    def broken():
        model(x)
        raise KeyError("the user's own")

    for strategy in STRATEGIES:
        with pytest.raises(KeyError, match="own"):
            dither.clipped_sum(model, broken, strategy=strategy)
    assert dither.clipped_sum(model, lambda: model(x).sum(1)).norms.shape == (4,)


def test_bad_arguments_name_the_fix():
    model, x = nn.Linear(3, 2), torch.randn(4, 3)

    def loss_fn() -> Tensor:
        return model(x).sum(1)

    with pytest.raises(errors.UnknownStrategyError, match="'auto', 'hold', 'ghost', 'tile', 'two_pass'"):
        dither.clipped_sum(model, loss_fn, strategy="fast")
    with pytest.raises(errors.UnknownClippingError):
        dither.clipped_sum(model, loss_fn, clipping="none")
    for bound in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(errors.ConfigurationError, match="max_grad_norm"):
            dither.clipped_sum(model, loss_fn, max_grad_norm=bound)
    for into in ({"weight": torch.zeros(3, 2)}, {}, {"weight": torch.zeros(2, 3)}):
        with pytest.raises(errors.ConfigurationError, match="into"):
            dither.clipped_sum(model, loss_fn, into=into)
    model.requires_grad_(False)
    with pytest.raises(errors.ConfigurationError, match="trainable"):
        dither.clipped_sum(model, loss_fn)


def test_examples_on_an_axis_that_an_operation_mixes_are_refused():
    x = torch.randn(3, 7, 4)  # (features, length, B)
    conv = nn.Conv1d(7, 5, 1)
    assert_refused(conv, lambda: conv(x).square().sum((0, 1)), errors.ExampleAxisError)
    linear = nn.Linear(3, 4)
    # the output features are called examples
    assert_refused(linear, lambda: linear(torch.randn(6, 3)).square().sum(0), errors.CaptureError)


def test_one_call_for_each_example_is_exact_or_refused():
    model, x = nn.Linear(3, 2), torch.randn(4, 3)
    assert_exact_or_refused(model, lambda: loss_of(torch.stack([model(row) for row in x])))
