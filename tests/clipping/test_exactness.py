"""The checks that the other files here share, and proof that they notice what they are for."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import dither
import oracle
from dither import errors
from dither.rules.linear import LinearWeight

STRATEGIES = ("auto", "hold", "ghost", "tile", "two_pass")
BOUND = 1e-10


class Function(nn.Module):
    """A model of named parameters (shapes, or tensors) and a function of the inputs and them."""

    def __init__(self, function: Callable[..., Tensor], **parameters: tuple[int, ...] | Tensor) -> None:
        super().__init__()
        self.function = function
        for name, made in parameters.items():
            value = made if isinstance(made, Tensor) else torch.randn(made)
            self.register_parameter(name, nn.Parameter(value))

    def forward(self, *inputs):
        return self.function(*inputs, **dict(self.named_parameters()))


def loss_of(output: Tensor) -> Tensor:
    """(B, ...) to one loss per example that is curved, so that every output gradient differs."""
    output = output.flatten(1)
    return output.square().sum(1) + output.sum(1)


def assert_exact(model, loss_fn, max_grad_norm=None, before=None):
    """Every public function in every strategy agrees with one example at a time, to 1e-10 in float64.

    Args:
        model: the model.
        loss_fn: one loss per example; called from the same random state each time.
        max_grad_norm: the clip bound; the median norm if None, so that some examples are clipped and some are not.
        before: called before each call of loss_fn, to put state back.
    """
    state = torch.get_rng_state()

    def again():
        torch.set_rng_state(state)
        if before is not None:
            before()
        return loss_fn()

    truth = oracle.per_example_gradients(model, again)
    norms = oracle.norms(truth)
    assert norms.max() > 0, "a test whose gradients are all zero shows nothing"
    bound = float(norms.median()) if max_grad_norm is None else max_grad_norm
    expected = oracle.clipped_sum(truth, bound)
    for strategy in STRATEGIES:
        result = dither.clipped_sum(model, again, max_grad_norm=bound, strategy=strategy)
        assert oracle.relative_error(result.gradients, expected) <= BOUND, strategy
        torch.testing.assert_close(result.norms.double(), norms, rtol=BOUND, atol=BOUND, msg=strategy)
        assert result.dropped == 0 and result.sensitivity == bound
    assert oracle.relative_error(dither.per_example_gradients(model, again), truth) <= BOUND
    torch.testing.assert_close(dither.per_example_norms(model, again).double(), norms, rtol=BOUND, atol=BOUND)


def assert_refused(model, loss_fn, error, match=None):
    """Every public function refuses by name, in every strategy."""
    for strategy in STRATEGIES:
        with pytest.raises(error, match=match):
            dither.clipped_sum(model, loss_fn, strategy=strategy)
    for function in (dither.per_example_gradients, dither.per_example_norms):
        with pytest.raises(error, match=match):
            function(model, loss_fn)


def assert_exact_or_refused(model, loss_fn, max_grad_norm=None):
    """Exact, or a kind of CaptureError; nothing else."""
    try:
        assert_exact(model, loss_fn, max_grad_norm)
    except errors.CaptureError:
        return


def removal_moves(model, loss_fn, batch, index, max_grad_norm, strategy):
    """By how many clip bounds the sum moves if one example of the batch is removed."""
    kept = [i for i in range(batch) if i != index]
    sums = [
        dither.clipped_sum(model, lambda rows=rows: loss_fn(rows), max_grad_norm=max_grad_norm, strategy=strategy)
        for rows in (list(range(batch)), kept)
    ]
    moved = sum((a - b).double().square().sum() for a, b in zip(*(s.gradients.values() for s in sums), strict=True))
    return float(moved**0.5) / max_grad_norm


# --- the checks notice -----------------------------------------------------------------------------

pytestmark = pytest.mark.usefixtures("double_precision")


@pytest.mark.parametrize("method", ["per_example_gradient", "squared_norm", "tile_squared_norm", "add_weighted_sum"])
def test_a_rule_that_is_wrong_in_the_ninth_digit_is_noticed(monkeypatch, method):
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(5, 3, 3)
    assert_exact(model, lambda: loss_of(model(x)))
    right = getattr(LinearWeight, method)

    def wrong(self, use, grad_output, *rest, **options):
        return right(self, use, grad_output * (1 + 1e-9), *rest, **options)

    monkeypatch.setattr(LinearWeight, method, wrong)
    with pytest.raises(AssertionError):
        assert_exact(model, lambda: loss_of(model(x)))


def test_a_parameter_that_is_left_out_is_noticed(monkeypatch):
    model, x = nn.Linear(3, 4), torch.randn(5, 3)
    monkeypatch.setattr(LinearWeight, "squared_norm", lambda self, use, g: g.new_zeros(use.batch))
    with pytest.raises(AssertionError):
        assert_exact(model, lambda: loss_of(model(x)))


def test_a_result_that_should_have_been_refused_is_noticed():
    model, x = nn.Linear(3, 4), torch.randn(5, 3)
    with pytest.raises(pytest.fail.Exception):
        assert_refused(model, lambda: loss_of(model(x)), errors.CaptureError)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_example_that_escapes_clipping_moves_the_sum_by_more_than_the_bound(monkeypatch, strategy):
    model, x = nn.Linear(3, 4), torch.randn(5, 3)
    loss = lambda rows: loss_of(model(x[rows]))  # noqa: E731
    assert removal_moves(model, loss, 5, 1, 0.1, strategy) == pytest.approx(1.0)
    monkeypatch.setattr("dither.clipping.functions.Flat.factors", lambda self, norms: torch.ones_like(norms))
    assert removal_moves(model, loss, 5, 1, 0.1, strategy) > 2
