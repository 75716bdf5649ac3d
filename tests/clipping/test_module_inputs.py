"""Models that take and return anything, in any memory layout: exact in every strategy."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections import OrderedDict, namedtuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

import dither
import oracle
from clipping.test_exactness import STRATEGIES, Function, assert_exact, loss_of

pytestmark = pytest.mark.usefixtures("double_precision")
B = 4


class Nested(nn.Module):
    """Takes its tensors from nested containers."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(3, 4)

    def forward(self, batch, flags=(), *, extra=None):
        x, (y, rest) = batch["x"], batch["y"]
        assert rest["none"] is None and rest["name"] == "text" and flags == (1, True, 2.5)
        h = self.a(x) + self.b(y)
        return h if extra is None else h * extra[0]["scale"]


def test_inputs_in_any_container():
    model, x, y, scale = Nested(), torch.randn(B, 3), torch.randn(B, 3), torch.rand(B, 1)
    batch = {"x": x, "y": [y, {"none": None, "name": "text", "index": 3, "on": True}]}
    assert_exact(model, lambda: loss_of(model(batch, (1, True, 2.5))))
    assert_exact(model, lambda: loss_of(model(flags=(1, True, 2.5), batch=batch, extra=[{"scale": scale}])))


@dataclasses.dataclass
class Output:
    """A model's output."""

    first: Tensor
    others: dict[str, Tensor | None]


Pair = namedtuple("Pair", ["first", "second"])
OUTPUTS = {
    "dataclass": (lambda a, b: Output(a, {"b": b, "none": None}), lambda o: (o.first, o.others["b"])),
    "named tuple": (Pair, lambda o: (o.first, o.second)),
    "nested tuples": (lambda a, b: ((a, (None, (b,))), 3), lambda o: (o[0][0], o[0][1][1][0])),
    "ordered dict": (lambda a, b: OrderedDict(a=a, b=b), lambda o: (o["a"], o["b"])),
    "transformers output": (
        lambda a, b: BaseModelOutput(last_hidden_state=a, hidden_states=(b,)),
        lambda o: (o.last_hidden_state, o.hidden_states[0]),
    ),
    "generator": (lambda a, b: (t for t in (a, b)), tuple),
}


@pytest.mark.parametrize("kind", OUTPUTS)
def test_outputs_in_any_container(kind):
    wrap, unwrap = OUTPUTS[kind]

    class Returns(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(3, 2)

        def forward(self, x):
            return wrap(self.a(x), self.b(x).tanh())

    model, x = nn.ModuleDict({"inner": Returns()}), torch.randn(B, 3)

    def loss_fn():
        a, b = unwrap(model["inner"](x))
        return loss_of(a) * 2 + loss_of(b)

    assert_exact(model, loss_fn)


def convolutions():
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(inplace=True), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(36, 3))


LAYOUTS = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    "every second": lambda x: x.repeat_interleave(2, 0)[::2],
    "stride zero": lambda x: x[:1].expand(B, -1, -1, -1),
    "requires grad": lambda x: x.clone().requires_grad_(),
    "not a leaf": lambda x: x.clone().requires_grad_() * 2,
    "one example": lambda x: x[:1],
    "storage offset": lambda x: torch.cat([x, x])[B:],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_inputs_in_any_memory(layout):
    model, x = convolutions(), torch.randn(B, 2, 5, 5)
    assert_exact(model, lambda: loss_of(model(LAYOUTS[layout](x))))


def test_volumes_channels_last():
    x = torch.randn(B, 2, 3, 4, 5).contiguous(memory_format=torch.channels_last_3d)
    model = nn.Sequential(nn.Conv3d(2, 4, 2), nn.SiLU(inplace=True), nn.Conv3d(4, 2, 1)).to(
        memory_format=torch.channels_last_3d
    )
    assert_exact(model, lambda: loss_of(model(x)))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_empty_batch(strategy):
    model = convolutions()
    result = dither.clipped_sum(model, lambda: loss_of(model(torch.zeros(0, 2, 5, 5))), strategy=strategy)
    assert result.norms.shape == result.losses.shape == (0,) and result.dropped == 0
    assert set(result.gradients) == {name for name, _ in model.named_parameters()}
    assert all(not g.any() for g in result.gradients.values())
    gradients = dither.per_example_gradients(model, lambda: loss_of(model(torch.zeros(0, 2, 5, 5))))
    assert all(gradients[name].shape == (0, *p.shape) for name, p in model.named_parameters())


def test_batches_of_changing_size():
    model = convolutions()
    for size in (3, 1, 5, 2, 3, 1):
        x = torch.randn(size, 2, 5, 5)
        assert_exact(model, lambda x=x: loss_of(model(x)))


def test_several_views_of_one_input():
    model, x = Function(lambda x, w: x[:, :3] @ w + x[:, 1:] @ w, w=(3, 2)), torch.randn(B, 4)
    assert_exact(model, lambda: loss_of(model(x)))


def test_copies_and_pickles_after_a_sum():
    model, x = convolutions(), torch.randn(B, 2, 5, 5)
    before = dither.clipped_sum(model, lambda: loss_of(model(x))).gradients
    keys = list(model.state_dict())
    for other in (copy.deepcopy(model), copy.copy(model), pickle.loads(pickle.dumps(model))):
        assert list(other.state_dict()) == keys
        assert_exact(other, lambda m=other: loss_of(m(x)))
        after = dither.clipped_sum(other, lambda m=other: loss_of(m(x))).gradients
        assert oracle.relative_error(after, before) == 0
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())


def test_a_copy_made_while_the_loss_runs_is_another_model():
    """A frozen teacher, copied inside: the student's gradients only."""
    model, x = nn.Linear(3, 4), torch.randn(B, 3)

    def loss_fn():
        teacher = copy.deepcopy(model)
        teacher.weight.data.mul_(0.5)
        return loss_of(model(x) - teacher(x))

    assert_exact(model, loss_fn)


def test_only_this_models_parameters_are_summed():
    model, other, x = nn.Linear(3, 4), nn.Linear(4, 2), torch.randn(B, 3)
    assert_exact(model, lambda: loss_of(other(model(x))))
    assert all(p.grad is None for p in other.parameters())


def test_blocks_without_gradients():
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)), torch.randn(B, 3)

    def loss_fn():
        with torch.no_grad():
            target, doubled = model(x), model[0].weight * 2
        with torch.inference_mode():
            guess = model(x).argmax(1).clone()
        hidden = F.linear(x, model[0].weight) * F.linear(x, doubled) + model[0](x).detach()
        weights = torch.ones(B).index_fill(0, (guess == 0).nonzero().flatten(), 0.5)
        return loss_of(model(model(x) - target)) * weights + loss_of(model[2](hidden))

    assert_exact(model, loss_fn)
    with torch.no_grad():
        assert_exact_inside_no_grad(model, loss_fn)


def assert_exact_inside_no_grad(model, loss_fn):
    with torch.enable_grad():
        truth = oracle.clipped_sum(oracle.per_example_gradients(model, loss_fn), 1.0)
    for strategy in STRATEGIES:
        result = dither.clipped_sum(model, loss_fn, strategy=strategy)
        assert oracle.relative_error(result.gradients, truth) <= 1e-10


def test_a_lazy_layer_is_built_by_its_first_sum():
    model, x = nn.LazyLinear(4), torch.randn(B, 3)
    gradients = dither.clipped_sum(model, lambda: loss_of(model(x))).gradients
    assert gradients["weight"].shape == (4, 3)
    assert_exact(model, lambda: loss_of(model(x)))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_layer_that_no_loss_reached_before_the_third_step(strategy):
    """The same operations, but a gate that was closed (a mask, a mixture of experts) is open now."""
    model, x = nn.ModuleList([nn.Linear(3, 4), nn.Linear(3, 4)]), torch.randn(B, 5, 3)
    closed, opened = torch.zeros(5, 1, dtype=torch.bool), torch.arange(5).view(5, 1) > 1
    for gate in (closed, closed, opened, closed, opened):

        def loss_fn(gate=gate):
            return loss_of(torch.where(gate, model[1](x), model[0](x)))

        truth = oracle.clipped_sum(oracle.per_example_gradients(model, loss_fn), 1.0)
        result = dither.clipped_sum(model, loss_fn, strategy=strategy)
        assert oracle.relative_error(result.gradients, truth) <= 1e-10
