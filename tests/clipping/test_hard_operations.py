"""Operations without a rule of their own, or with one that is easily wrong: exact in every strategy, or refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dither
import oracle
from clipping.test_exactness import STRATEGIES, Function, assert_exact, assert_refused, loss_of
from dither import errors

pytestmark = pytest.mark.usefixtures("double_precision")
each_strategy = pytest.mark.parametrize("strategy", STRATEGIES)
B = 4


KEYWORDS = {
    "div": lambda x, p: torch.div(other=p, input=x),
    "div, of a parameter": lambda x, p: torch.div(other=x.abs() + 1, input=p),
    "sub": lambda x, p: torch.sub(other=p, input=x),
    "mul": lambda x, p: torch.mul(other=x, input=p),
    "add, scaled": lambda x, p: torch.add(alpha=2, other=p, input=x),
    "linear": lambda x, p: F.linear(weight=p.view(5, 1), input=x[..., :1]),
    "matmul": lambda x, p: torch.matmul(other=p.view(5, 1), input=x),
    "layer norm": lambda x, p: F.layer_norm(bias=p, eps=1e-3, weight=p, input=x, normalized_shape=[5]),
    "convolution": lambda x, p: F.conv1d(padding=1, weight=p[:3].view(1, 1, 3), input=x.unsqueeze(1)),
    "embedding": lambda x, p: F.embedding(weight=p.view(5, 1), input=(x > 0).long()),
}


@pytest.mark.parametrize("name", KEYWORDS)
def test_keywords_in_another_order(name):
    model, x = Function(KEYWORDS[name], p=(5,)), torch.randn(B, 5)
    assert_exact(model, lambda: loss_of(model(x)))


def test_in_place_operation_with_two_parameters():
    model, x = Function(lambda x, p, q: x.clone().lerp_(p, q), p=(5,), q=(5,)), torch.randn(B, 5)
    assert_exact(model, lambda: loss_of(model(x)))


@pytest.mark.parametrize("name", ["pow_", "masked_fill_", "addcmul_"])
def test_in_place_operations_without_a_rule(name):
    bodies = {
        "pow_": lambda x, p, q: (x.abs() + 1).pow_(p),
        "masked_fill_": lambda x, p, q: x.clone().masked_fill_(x > 0, q),
        "addcmul_": lambda x, p, q: x.clone().addcmul_(p, p + q),
    }
    model, x = Function(bodies[name], p=(5,), q=()), torch.randn(B, 5)
    assert_exact(model, lambda: loss_of(model(x)))


@each_strategy
@pytest.mark.parametrize("operation", ["einsum", "transposed convolution", "prelu", "lerp"])
def test_one_example_that_is_not_finite_in_an_operation_without_a_rule(operation, strategy):
    bodies = {
        "einsum": (lambda x, w: torch.einsum("btd,dpq->btpq", x, w), (5, 3, 2)),
        "transposed convolution": (lambda x, w: F.conv_transpose1d(x, w), (6, 3, 2)),
        "prelu": (lambda x, w: F.prelu(x, w), (6,)),
        "lerp": (lambda x, w: torch.lerp(x, x * x, w), (5,)),
    }
    body, shape = bodies[operation]
    model, x = Function(body, w=shape), torch.randn(B, 6, 5)
    x[1, 2, 3] = float("nan")
    expected = dither.clipped_sum(model, lambda: loss_of(model(x[[0, 2, 3]])), strategy=strategy)
    result = dither.clipped_sum(model, lambda: loss_of(model(x)), strategy=strategy)
    assert result.dropped == 1
    assert oracle.relative_error(result.gradients, expected.gradients) <= 1e-10


COMPLEX = {
    "sum with a real parameter": (lambda x, p: x + p, (5,), torch.float64),
    "product with a real parameter": (lambda x, p: x * p, (5,), torch.float64),
    "einsum": (lambda x, p: torch.einsum("bi,io->bo", x, p), (5, 3), torch.complex128),
    "convolution": (lambda x, p: F.conv1d(x.unsqueeze(1), p), (3, 1, 2), torch.complex128),
}


@pytest.mark.parametrize("name", COMPLEX)
def test_complex_numbers_are_exact_or_refused(name):
    body, shape, dtype = COMPLEX[name]
    model, x = Function(body, p=torch.randn(shape, dtype=dtype)), torch.randn(B, 5, dtype=torch.complex128)
    try:
        found = dither.per_example_gradients(model, lambda: model(x).abs().square().flatten(1).sum(1))
        dither.clipped_sum(model, lambda: model(x).abs().square().flatten(1).sum(1))
    except errors.CaptureError:
        return
    truth = oracle.per_example_gradients(model, lambda: model(x).abs().square().flatten(1).sum(1))
    torch.testing.assert_close(found, truth, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("how", ["embedding bag", "torch.embedding"])
def test_gradients_scaled_by_frequency_are_refused(how):
    bodies = {
        "embedding bag": lambda i, w: F.embedding_bag(i, w, mode="sum", scale_grad_by_freq=True),
        "torch.embedding": lambda i, w: torch.embedding(w, i, -1, True),
    }
    model, ids = Function(bodies[how], w=(2, 3)), torch.tensor([[0, 0, 0]] + [[0, 1, 1]] * 3)
    assert_refused(model, lambda: loss_of(model(ids)), errors.CaptureError)


@pytest.mark.parametrize("shape", [(B,), (B, 3)])
def test_embeddings_with_sparse_gradients(shape):
    """The result is dense, and the same as of a dense table."""
    ids = torch.randint(6, shape)
    dense = Function(lambda i, w: F.embedding(i, w), w=(6, 3))
    sparse = Function(lambda i, w: F.embedding(i, w, sparse=True), w=dense.w.detach().clone())
    truth = oracle.per_example_gradients(dense, lambda: loss_of(dense(ids)))
    bound = float(oracle.norms(truth).median())
    for strategy in STRATEGIES:
        result = dither.clipped_sum(sparse, lambda: loss_of(sparse(ids)), max_grad_norm=bound, strategy=strategy)
        assert result.gradients["w"].layout == torch.strided
        assert oracle.relative_error(result.gradients, oracle.clipped_sum(truth, bound)) <= 1e-10


OPERATIONS = {
    "expand_as": (lambda x, p: x * p.expand_as(x), (5,)),
    "distances": (lambda x, p: torch.cdist(x, p), (3, 5)),
    "cosine similarity": (lambda x, p: F.cosine_similarity(x.unsqueeze(-2), p, dim=-1), (3, 5)),
    "maximum": (lambda x, p: torch.maximum(x, p), (5,)),
    "solve": (lambda x, p: torch.linalg.solve(p, x.mT), (5, 5)),
    "powers": (lambda x, p: (p.abs() + 1) ** x + (x.abs() + 1) ** p, (5,)),
    "quotients": (lambda x, p: 1 / (p * p + 1) - x / (p * p + 1) + (p + 3) / (x * x + 1), (5,)),
    "reversed": (lambda x, p: torch.rsub(x, p, alpha=2) + (3 - p) * x - (2 * p - x), (5,)),
    "spectrum": (lambda x, p: torch.fft.irfft(torch.fft.rfft(x) * torch.view_as_complex(p), n=5), (3, 2)),
    "cat along features": (lambda x, p: torch.cat([x, p.expand(B, 6, 2)], -1), (1, 1, 2)),
    "keys and values": (lambda x, p: F.scaled_dot_product_attention(x, *p.expand(2, B, 3, 5).unbind(0)), (2, 1, 3, 5)),
    "scatter": (lambda x, p: torch.zeros(B, 6, 5).scatter_add(2, (x > 0).long(), p.expand(B, 6, 5)), (5,)),
    "lookup by the examples": (lambda x, p: p[(x > 0).long()] * x, (2,)),
    "one parameter in every place": (lambda x, p: torch.addcmul(x, p, p) + torch.lerp(p * x, x, p), (5,)),
    "examples on the last axis": (lambda x, p: (x.permute(1, 2, 0) * p + p).permute(2, 0, 1), (6, 5, 1)),
    "a place for each example": (lambda x, p: (x.permute(1, 2, 0) * p).permute(2, 0, 1), (B,)),
    "weight on the left": (lambda x, p: p @ x.mT, (3, 5)),
    "weight as the input": (lambda x, p: F.linear(p, x[:, 0]).T, (3, 5)),
    "batch norm's affine part": (lambda x, p: F.batch_norm(x, torch.zeros(6), torch.ones(6), p, p), (6,)),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_of_every_kind(name):
    body, shape = OPERATIONS[name]
    model, x = Function(body, p=shape), torch.randn(B, 6, 5)
    assert_exact(model, lambda: loss_of(model(x)))


VIEWS = {
    "linear with a bias": lambda: nn.Linear(5, 5),  # on three dimensions torch returns a view of addmm's output
    "instance norm": lambda: nn.InstanceNorm1d(6, affine=True),
    "einsum": lambda: Function(lambda x, w: torch.einsum("btd,dp->btp", x, w), w=(5, 5)),
    "tensordot": lambda: Function(lambda x, w: torch.tensordot(x, w, dims=1), w=(5, 5)),
}
STEPS = {
    "ReLU": lambda: nn.ReLU(inplace=True),
    "dropout": lambda: nn.Dropout(0.5, inplace=True),
    "layer scale": lambda: Function(lambda h, p: h.mul_(p), p=(5,)),
}


@pytest.mark.parametrize("before", ["first layer", "later layer"])
@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("step", STEPS)
def test_in_place_on_an_output_that_is_a_view(step, name, before):
    layers = [VIEWS[name](), STEPS[step](), nn.Linear(5, 3)]
    model = nn.Sequential(*([nn.Linear(5, 5)] if before == "later layer" else []), *layers)
    x = torch.randn(B, 6, 5)
    assert_exact(model, lambda: loss_of(model(x)))


def _slice_of_examples(x, p, w):
    h = x.clone()
    h[..., :2].mul_(p)
    return F.linear(h, w)


def _slice_of_an_output(x, p, w):
    h = F.linear(x, w)
    h[..., :2].add_(p)
    return h


def _named_view(x, p, w):
    h = x.clone()
    view = h.view(-1, 2)
    view *= p
    return F.linear(h, w)


def _view_and_base(x, p, w):
    h = x.clone()
    view = h[..., :2]
    view.mul_(p)
    return torch.cat([F.linear(h, w), view], -1)


@pytest.mark.parametrize("body", [_slice_of_examples, _slice_of_an_output, _named_view, _view_and_base])
def test_in_place_on_a_view_whose_base_is_used_afterwards(body):
    model, x = Function(body, p=(2,), w=(4, 4)), torch.randn(B, 4)
    assert_exact(model, lambda: loss_of(model(x)))
