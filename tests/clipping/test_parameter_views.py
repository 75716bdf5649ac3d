"""Parameters used through views, lists, other modules and in-place arithmetic: exact in every strategy."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dither
from clipping.test_exactness import Function, assert_exact, assert_refused, loss_of
from dither import errors

pytestmark = pytest.mark.usefixtures("double_precision")
B = 4


VIEWS = {
    "view": (lambda x, p: x @ p.view(5, 4), (4, 5)),
    "transpose": (lambda x, p: x @ p.T, (4, 5)),
    "mT of a stack": (lambda x, p: (x.unsqueeze(1) @ p.mT).sum(1), (2, 4, 5)),
    "item": (lambda x, p: x * p[0] + p[1], (2, 5)),
    "item twice": (lambda x, p: x * p[0] * p[0], (2, 5)),
    "negative step": (lambda x, p: x * p.flip(0)[::2], (10,)),
    "unbind": (lambda x, p: (lambda a, b: x * a + b)(*p.unbind(0)), (2, 5)),
    "iterated": (lambda x, p: sum(x * row for row in p), (3, 5)),
    "chunk": (lambda x, p: (lambda a, b: F.linear(x, a) * F.linear(x, b))(*p.chunk(2)), (6, 5)),
    "split": (lambda x, p: torch.cat([F.linear(x, a).tanh() for a in p.split([2, 4])], -1), (6, 5)),
    "part of a bias": (lambda x, p: torch.cat([x[..., :2] + p[:2], x[..., 2:] * p[2:]], -1), (5,)),
    "expand": (lambda x, p: x * p.expand(3, 5), (1, 5)),
    "squeeze and unsqueeze": (lambda x, p: x * p.squeeze(0).unsqueeze(0), (1, 5)),
    "diagonal": (lambda x, p: x * p.diagonal(), (5, 5)),
    "triangle": (lambda x, p: x @ p.tril(), (5, 5)),
    "index": (lambda x, p: x * p[dither.constant(torch.tensor([0, 0, 2, 1, 2]))], (3,)),
    "repeat interleave": (lambda x, p: x * p.repeat_interleave(dither.constant(torch.tensor([2, 3]))), (2,)),
    "unfold": (lambda x, p: x @ p.unfold(0, 4, 2).mT.reshape(-1, 4)[:5], (20,)),
    "masked": (lambda x, p: F.linear(x, p * torch.ones(4, 5).tril()), (4, 5)),
    "softmax over": (lambda x, p: x * p.softmax(0), (5,)),
    "no dimension": (lambda x, p: x * p + p, ()),
    "built in place": (
        lambda x, p: x @ torch.zeros(5, 4).index_add(0, dither.constant(torch.tensor([4, 1])), p),
        (2, 4),
    ),
    "of another dtype": (lambda x, p: x * p.float().double(), (5,)),
    "reshaped for a convolution": (lambda x, p: F.conv1d(x, p.view(2, 3, 2)), (12,)),
}


@pytest.mark.parametrize("name", VIEWS)
def test_views_of_a_parameter(name):
    body, shape = VIEWS[name]
    model, x = Function(body, p=shape), torch.randn(B, 3, 5)
    assert_exact(model, lambda: loss_of(model(x)))


SHARED = {
    "linear and convolution": (lambda x, p: F.linear(x, p) + F.conv1d(x.mT, p.view(4, 5, 1)).mT, (4, 5)),
    "embedding and linear": (lambda x, p: F.linear(F.embedding(x.argmax(-1) % 4, p), p), (4, 5)),
    "layer norm and scale": (lambda x, p: F.layer_norm(x, (5,), p, p) * p + p, (5,)),
    "weight and bias": (lambda x, p: F.linear(x, p.view(5, 5), p[:5]), (25,)),
    "both factors": (lambda x, p: F.linear(F.linear(x, p), p.T), (4, 5)),
    "query, key and value": (
        lambda x, p: F.scaled_dot_product_attention(*(F.linear(x, w) for w in p.unbind(0))),
        (3, 5, 5),
    ),
    "convolution and its transpose": (lambda x, p: F.conv_transpose1d(F.conv1d(x, p), p), (4, 3, 2)),
    "scale, shift and power": (lambda x, p: (x.abs() + 1) ** p * p - p, (5,)),
    "three layers deep": (lambda x, p: ((x @ p).tanh() @ p).tanh() @ p, (5, 5)),
}


@pytest.mark.parametrize("name", SHARED)
def test_shared(name):
    body, shape = SHARED[name]
    model, x = Function(body, p=shape), torch.randn(B, 3, 5)
    assert_exact(model, lambda: loss_of(model(x)))


def test_a_module_called_in_a_loop():
    model, x = nn.Sequential(nn.Linear(5, 5), nn.LayerNorm(5)), torch.randn(B, 3, 5)

    def loss_fn():
        h = x
        for step in range(4):
            h = h + model(h).tanh() / (step + 1)
        return loss_of(h)

    assert_exact(model, loss_fn)


class Containers(nn.Module):
    """Parameters in a list and a dict, some frozen, one unused."""

    def __init__(self):
        super().__init__()
        self.rows = nn.ParameterList([nn.Parameter(torch.randn(5)) for _ in range(3)])
        self.named = nn.ParameterDict(
            {"scale": nn.Parameter(torch.randn(5)), "matrix": nn.Parameter(torch.randn(4, 5))}
        )
        self.frozen = nn.Linear(5, 5).requires_grad_(False)
        self.unused = nn.Parameter(torch.randn(2))
        self.empty = nn.Parameter(torch.randn(0))

    def forward(self, x, rows=3):
        for row in list(self.rows)[:rows]:
            x = self.frozen(x).tanh() * row
        return F.linear(x * self.named["scale"], self.named["matrix"])


def test_lists_dicts_frozen_and_unused_parameters():
    model, x = Containers(), torch.randn(B, 3, 5)
    for rows in (3, 1, 2):
        assert_exact(model, lambda rows=rows: loss_of(model(x, rows)))
    model.rows[1].requires_grad_(False)
    model.frozen.bias.requires_grad_(True)
    assert_exact(model, lambda: loss_of(model(x)))
    result = dither.clipped_sum(model, lambda: loss_of(model(x)))
    assert "rows.1" not in result.gradients and not result.gradients["unused"].any()


RESIDUALS = {
    "h += f(h)": lambda x, w, p: _iadd(F.linear(x, w), lambda h: F.linear(h.tanh(), w)),
    "h += x": lambda x, w, p: _iadd(F.linear(x, w), lambda h: x),
    "h.add_(f(h)) twice": lambda x, w, p: F.linear(x, w).add_(F.linear(x.tanh(), w)).add_(F.linear(-x, w), alpha=2),
    "h += p": lambda x, w, p: _iadd(F.linear(x, w), lambda h: p),
    "h *= p": lambda x, w, p: F.linear(x, w).mul_(p),
    "h[:, 0] += p": lambda x, w, p: _first_place(F.linear(x, w), p),
    "x.clone()[:, 0] += p": lambda x, w, p: F.linear(_first_place(x.clone(), p), w),
    "relu_ after": lambda x, w, p: F.linear(x, w).relu_() * p,
    "in place on the output of a sum": lambda x, w, p: (x + p).mul_(2).clamp_(-3, 3) @ w,
    "view written with data": lambda x, w, p: _filled(F.linear(x, w), x) * p,
    "output buffer": lambda x, w, p: _output_buffer(F.linear(x, w)) + p,
}


def _iadd(h, f):
    h += f(h)
    return h


def _first_place(h, p):
    h[:, 0] += p
    h[:, 1] *= p
    return h


def _filled(h, x):
    h[:, 0] = x[:, 0]
    h[:, 1].zero_()
    return h


def _output_buffer(h):
    out = torch.zeros(h.shape)
    out[:, :2] = h[:, :2]
    out[:, 2] = h[:, 2] * 3
    return out


@pytest.mark.parametrize("name", RESIDUALS)
def test_in_place_arithmetic_and_residuals(name):
    model, x = Function(RESIDUALS[name], w=(5, 5), p=(5,)), torch.randn(B, 3, 5)
    assert_exact(model, lambda: loss_of(model(x)))


def test_a_residual_that_destroys_what_is_needed_is_refused_as_autograd_does():
    def body(x, w):
        x = x * 1
        x += F.linear(x, w)
        return x

    model, x = Function(body, w=(5, 5)), torch.randn(B, 5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss_of(model(x)).sum().backward()
    assert_refused(model, lambda: loss_of(model(x)), errors.SavedInputChangedError)


WHERE = {
    "one place": (lambda h: (slice(None), 0), (5,)),
    "slices": (lambda h: (slice(None), slice(1, None), slice(0, 4, 2)), (2, 2)),
    "a broadcast value": (lambda h: (slice(None), slice(0, 2)), (5,)),
    "a number": (lambda h: (slice(None), 1, 2), ()),
    "ellipsis": (lambda h: (..., -1), (3,)),
    "everything": (lambda h: slice(None), (3, 5)),
    "list of places": (lambda h: (slice(None), [2, 0]), (2, 5)),
    "tensor of places": (lambda h: (slice(None), torch.tensor([2, 0]), torch.tensor([1, 1])), (2,)),
    "constant mask": (lambda h: (slice(None), torch.tensor([True, False, True])), (5,)),
    "None": (lambda h: (slice(None), None, 0), (5,)),
    "mask of the data": (lambda h: h.detach() > 0.3, ()),
    "mask of the data, by place": (lambda h: h.detach()[..., 0] > 0, (5,)),
}


@pytest.mark.parametrize("name", WHERE)
def test_a_parameter_written_into_rows_after_a_first_layer(name):
    where, shape = WHERE[name]

    def body(x, w, p):
        h = F.linear(x, w)
        h[where(h)] = p
        return F.linear(h.tanh(), w)

    model, x = Function(body, w=(5, 5), p=shape), torch.randn(B, 3, 5)
    assert_exact(model, lambda: loss_of(model(x)))


@pytest.mark.parametrize("name", WHERE)
def test_a_parameter_written_into_inputs(name):
    where, shape = WHERE[name]

    def body(x, p):
        x = x * 1
        x[where(x)] = p
        return x * p.sum()

    model, x = Function(body, p=shape), torch.randn(B, 3, 5)
    assert_exact(model, lambda: loss_of(model(x)))


MEETS = {
    "p.to(x)": lambda x, p: x + p.to(x),
    "p.type_as(x)": lambda x, p: x + p.type_as(x),
    "p.view_as": lambda x, p: x * p.view_as(x[0]),
    "broadcast_tensors": lambda x, p: torch.mul(*torch.broadcast_tensors(x, p)),
}


@pytest.mark.parametrize("name", MEETS)
def test_a_parameter_takes_shape_or_dtype_from_the_examples(name):
    model, x = Function(MEETS[name], p=(5,)), torch.randn(B, 5)
    assert_exact(model, lambda: loss_of(model(x)))


def test_low_rank_update_added_to_a_frozen_weight():
    class Merged(nn.Module):
        def __init__(self):
            super().__init__()
            self.base = nn.Parameter(torch.randn(3, 5), requires_grad=False)
            self.a, self.b = nn.Parameter(torch.randn(2, 5)), nn.Parameter(torch.randn(3, 2))

        def forward(self, x):
            return F.linear(x, self.base + self.b @ self.a)

    model, x = Merged(), torch.randn(B, 5)
    assert_exact(model, lambda: loss_of(model(x)))


def test_a_critic_frozen_while_the_actors_loss_is_computed():
    model, x = nn.ModuleDict({"actor": nn.Linear(5, 5), "critic": nn.Linear(5, 3)}), torch.randn(B, 5)

    def loss_fn():
        model["critic"].requires_grad_(False)
        loss = loss_of(model["critic"](model["actor"](x)))
        model["critic"].requires_grad_(True)
        return loss + loss_of(model["critic"](x))

    assert_exact(model, loss_fn)


def test_a_weight_detached_in_place_is_a_constant():
    def body(x, w, p):
        weight = w * 2
        weight.detach_()
        return F.linear(x, weight) + p

    model, x = Function(body, w=(3, 5), p=(3,)), torch.randn(B, 5)
    assert_exact(model, lambda: loss_of(model(x)))
    assert not dither.clipped_sum(model, lambda: loss_of(model(x))).gradients["w"].any()


def test_out_arguments_are_refused_as_autograd_does():
    model, x = Function(lambda x, w: torch.mm(x, w, out=torch.empty(B, 3)) * 2, w=(5, 3)), torch.randn(B, 5)
    with pytest.raises(RuntimeError, match="out="):
        loss_of(model(x))
    assert_refused(model, lambda: loss_of(model(x)), errors.CaptureError)
