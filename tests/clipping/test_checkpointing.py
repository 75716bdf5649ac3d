"""Activation checkpoints and other saved-tensor hooks: exact, and the memory they were meant to save stays saved."""

from __future__ import annotations

import gc
import weakref
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import dither
import oracle
from dither import errors

pytestmark = pytest.mark.usefixtures("double_precision")
STRATEGIES = ("auto", "hold", "ghost", "tile", "two_pass")


class Block(nn.Module):
    """Attention, dropout, an in-place activation, a scale through weight normalisation, a constant made inside."""

    def __init__(self, width=6):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attend = nn.MultiheadAttention(width, 2, dropout=0.2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 9), nn.ReLU(inplace=True), nn.Dropout(0.3), nn.Linear(9, width))
        self.direction, self.gain = nn.Parameter(torch.randn(width, width)), nn.Parameter(torch.randn(width, 1))
        self.places = nn.Parameter(torch.randn(7, width))

    def forward(self, x, shift=None):
        h = self.norm(x) + F.embedding(torch.arange(x.shape[1]), self.places)
        x = x + self.attend(h, h, h)[0]
        x = F.linear(x, self.gain * self.direction / self.direction.norm(dim=1, keepdim=True))
        return x + self.mlp(x) + (0 if shift is None else shift)


class Stack(nn.Module):
    """Blocks, each in a checkpoint of the kind asked for."""

    def __init__(self, kind, blocks=3):
        super().__init__()
        self.kind, self.blocks, self.head = kind, nn.ModuleList(Block() for _ in range(blocks)), nn.Linear(6, 2)

    def forward(self, x):
        x = self.blocks[0](x)
        for block in self.blocks:  # the first a second time: tied
            x = self.run(block, x)
        return self.head(x)

    def run(self, block, x):
        if self.kind in ("reentrant", "not reentrant"):
            return checkpoint(block, x, x.mean((1, 2), keepdim=True), use_reentrant=self.kind == "reentrant")
        if self.kind == "nested":
            inner = lambda y: checkpoint(block, y, y.mean((1, 2), keepdim=True), use_reentrant=False)  # noqa: E731
            return checkpoint(inner, x, use_reentrant=False)
        if self.kind == "sequential":
            return checkpoint_sequential([block, block, block], 2, x, use_reentrant=False)
        with save_on_cpu() if self.kind == "save on cpu" else nullcontext():
            return block(x, x.mean((1, 2), keepdim=True))


KINDS = ["reentrant", "not reentrant", "nested", "sequential", "save on cpu"]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kind", KINDS)
def test_exact(kind, strategy):
    model, x = Stack(kind), torch.randn(4, 5, 6)

    def loss_fn():
        torch.manual_seed(2)
        return model(x).square().flatten(1).mean(1)

    if kind != "sequential":
        model.kind = "plain"  # torch.autograd.grad does not go through a reentrant checkpoint
    truth = oracle.per_example_gradients(model, loss_fn)
    model.kind = kind
    bound = float(oracle.norms(truth).median())
    for _ in range(2):  # anew, then with the layouts kept
        result = dither.clipped_sum(model, loss_fn, max_grad_norm=bound, strategy=strategy)
        assert oracle.relative_error(result.gradients, oracle.clipped_sum(truth, bound)) <= 1e-10
    assert oracle.relative_error(dither.per_example_gradients(model, loss_fn), truth) <= 1e-10
    assert all(p.grad is None for p in model.parameters())


def test_a_reentrant_checkpoint_is_itself_again_afterwards():
    from torch.utils.checkpoint import CheckpointFunction

    model, x = Stack("reentrant"), torch.randn(4, 5, 6)
    dither.per_example_norms(model, lambda: model(x).flatten(1).sum(1))
    assert "apply" not in vars(CheckpointFunction)
    with pytest.raises(errors.LossShapeError):
        dither.per_example_norms(model, lambda: model(x))
    assert "apply" not in vars(CheckpointFunction)


def test_without_an_input_that_requires_grad_a_reentrant_checkpoint_trains_nothing_here_either():
    model, x = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)), torch.randn(4, 3)

    def loss_fn():
        return model[1](checkpoint(model[0], x, use_reentrant=True)).sum(1)

    with pytest.warns(UserWarning, match="None of the inputs have requires_grad"):
        truth = oracle.per_example_gradients(model, loss_fn)
        ours = dither.per_example_gradients(model, loss_fn)
    assert not truth["0.weight"].any() and oracle.relative_error(ours, truth) <= 1e-10


def test_a_checkpoint_that_recomputes_something_else_is_refused():
    model, x, times = nn.Linear(3, 3), torch.randn(4, 3, requires_grad=True), []

    def unsteady(y):
        times.append(0)
        return model(y).sin() if len(times) == 1 else model(y.repeat(2, 1)).sin()

    with pytest.raises(errors.CoverageError, match="checkpoint"):
        dither.clipped_sum(model, lambda: checkpoint(unsteady, x, use_reentrant=False).cos().sum(1))
    assert model.weight.grad is None


def test_a_mixture_of_examples_inside_a_checkpoint_is_refused():
    model, x = nn.Linear(3, 3), torch.randn(4, 3, requires_grad=True)
    for reentrant in (False, True):
        with pytest.raises(errors.CoupledExamplesError):
            mix = lambda y: (h := model(y)) - h.mean(0)  # noqa: E731
            dither.clipped_sum(model, lambda r=reentrant, m=mix: checkpoint(m, x, use_reentrant=r).square().sum(1))


def test_nothing_of_the_graph_survives():
    model, x = Stack("not reentrant"), torch.randn(4, 5, 6)
    seen = []

    def loss_fn():
        losses = model(x).flatten(1).sum(1)
        seen.append(weakref.ref(losses))
        return losses

    gc.collect()
    gc.disable()
    try:
        for strategy in STRATEGIES:
            dither.clipped_sum(model, loss_fn, strategy=strategy)
        assert not any(ref() is not None for ref in seen)
    finally:
        gc.enable()
