"""What changes from one step to the next under layouts that are kept: rows, masks, neighbours, gates, old outputs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dither
import oracle
from clipping.test_exactness import STRATEGIES, loss_of
from dither import errors
from dither.diffusion import DiffusionLoss, Process, dit

pytestmark = pytest.mark.usefixtures("double_precision")
each_strategy = pytest.mark.parametrize("strategy", STRATEGIES)
B = 4
STRAIGHT, CROSSED, REVERSED = torch.tensor([[0, 1, 2, 3], [0, 2, 1, 3], [3, 2, 1, 0]])


def two_layers():
    return nn.ModuleList([nn.Linear(5, 5), nn.Linear(5, 5)])


def _index_assignment(h, order):
    restored = torch.zeros(h.shape)
    restored[order] = h
    return restored


def _python_list(h, order):
    rows = h.unbind(0)
    return torch.stack([rows[i] for i in order.argsort().tolist()])


def _sparse_product(h, order):
    matrix = torch.sparse_coo_tensor(torch.stack([order, STRAIGHT]), torch.ones(B), (B, B))
    return torch.sparse.mm(matrix, h)


def _own_rows(h, order):
    rows = [row.tanh() for row in h]  # each a tensor of its own memory
    return torch.stack([rows[i] for i in order.argsort().tolist()])


def _rows_into_places(h, order):
    rows, placed = [row.tanh() for row in h], torch.zeros(h.shape)
    for place, row in zip(order.tolist(), rows, strict=True):
        placed[place] = row
    return placed


def _sparse(order):
    return torch.sparse_coo_tensor(torch.stack([order.clone(), STRAIGHT.clone()]), torch.ones(B), (B, B))


def _slices(h, order):
    at = order.argsort()
    return torch.stack([h[i : i + 1][0] for i in at])


RESTORE = {
    "rows of their own": _own_rows,
    "rows into places": _rows_into_places,
    "slices by tensors": _slices,
    "narrow by a tensor": lambda h, order: torch.stack([torch.narrow(h, 0, i, 1)[0] for i in order.argsort()]),
    "halves": lambda h, order: torch.cat([h[2:].flip(0), h[:2].flip(0)] if int(order[0]) else [h[:2], h[2:]]),
    "sparse product of its own": lambda h, order: torch.sparse.mm(_sparse(order), h),
    "sparse rows": lambda h, order: _sparse(order).to_sparse_csr() @ h,
    "embedding_bag": lambda h, order: F.embedding_bag(order.argsort(), h, torch.arange(B), mode="sum"),
    "aten's index_select": lambda h, order: torch.ops.aten.index_select.default(h, 0, order.argsort()),
    "aten's index": lambda h, order: torch.ops.aten.index.Tensor(h, [order.argsort()]),
    "out[order] = h": _index_assignment,
    "rows of a Python list": _python_list,
    "F.embedding(order, h)": lambda h, order: F.embedding(order.argsort(), h),
    "sparse product": _sparse_product,
    "h[numpy array]": lambda h, order: h[order.numpy().argsort()],
    "scatter_reduce": lambda h, order: torch.zeros(B, 5).scatter_reduce(0, order.view(B, 1).expand(B, 5), h, "sum"),
    "index_reduce": lambda h, order: torch.ones(B, 5).index_reduce(0, order, h, "amax", include_self=False),
    "torch.gather(input=h, ...)": lambda h, order: torch.gather(
        input=h, dim=0, index=order.argsort().view(B, 1).expand(B, 5)
    ),
    "index_add": lambda h, order: torch.zeros(B, 5).index_add(0, order, h),
    "put": lambda h, order: torch.zeros(B, 5).put(order.view(B, 1) * 5 + torch.arange(5), h),
    "dict": lambda h, order: torch.stack([row for _, row in sorted(zip(order.tolist(), h.unbind(0), strict=True))]),
}


@each_strategy
@pytest.mark.parametrize("how", RESTORE)
def test_rows_in_another_order_on_a_later_step_are_refused(how, strategy):
    model, x, scale = two_layers(), torch.randn(B, 5), torch.arange(1.0, B + 1).unsqueeze(1)
    rows = {order: x[order] for order in (STRAIGHT, REVERSED)}  # not seen: only what is done to outputs tells

    def loss_fn(order):
        return loss_of(model[1](RESTORE[how](model[0](rows[order]), order).tanh()) * scale)

    truth = oracle.clipped_sum(oracle.per_example_gradients(model, lambda: loss_fn(STRAIGHT)), 0.5)
    for _ in range(2):
        result = dither.clipped_sum(model, lambda: loss_fn(STRAIGHT), max_grad_norm=0.5, strategy=strategy)
        assert oracle.relative_error(result.gradients, truth) <= 1e-10
    with pytest.raises(errors.CoupledExamplesError, match="another order"):
        dither.clipped_sum(model, lambda: loss_fn(REVERSED), max_grad_norm=0.5, strategy=strategy)


@each_strategy
def test_time_first_rows_whose_mask_opens_on_a_later_step(strategy):
    model, x = two_layers(), torch.randn(2, 2, 5)  # as many steps as examples
    for mask in (torch.eye(2).bool(), torch.eye(2).bool(), torch.ones(2, 2).bool()):

        def loss_fn(mask=mask):
            losses = model[1](model[0](x.transpose(0, 1)).tanh()).square().sum(-1)
            return losses.masked_fill(~mask, 0).sum(0)

        truth = oracle.clipped_sum(oracle.per_example_gradients(model, loss_fn), 0.5)
        result = dither.clipped_sum(model, loss_fn, max_grad_norm=0.5, strategy=strategy)
        assert oracle.relative_error(result.gradients, truth) <= 1e-10


def test_neighbours_that_are_other_examples_on_a_later_step():
    model, x, scale = two_layers(), torch.randn(B, 5), torch.arange(1.0, B + 1).unsqueeze(1)

    def loss_fn(neighbour):
        h = model[0](x).tanh()
        return loss_of(model[1](h + h[neighbour]) * scale)

    for _ in range(2):
        dither.clipped_sum(model, lambda: loss_fn(STRAIGHT))
    with pytest.raises(errors.CoupledExamplesError):
        dither.clipped_sum(model, lambda: loss_fn(CROSSED))


def test_coupling_behind_a_gate_that_opens_on_a_later_step():
    model, x = two_layers(), torch.randn(B, 5)
    closed, opened = torch.tensor(-9.0), torch.tensor(9.0)
    for gate in (closed, closed):
        dither.clipped_sum(model, lambda g=gate: loss_of(model[1](_gated(model[0](x).tanh(), g))))
    with pytest.raises(errors.CoupledExamplesError):
        dither.clipped_sum(model, lambda: loss_of(model[1](_gated(model[0](x).tanh(), opened))))


def _gated(h, gate):
    return h + (h.flip(0) + gate).relu()


@each_strategy
def test_an_output_of_an_earlier_sum_is_refused(strategy):
    class Remembers(nn.Module):
        def __init__(self):
            super().__init__()
            self.shift, self.inner, self.before = nn.Parameter(torch.randn(5)), nn.Linear(5, 3), None

        def forward(self, x):
            h = x + self.shift
            out = self.inner(h if self.before is None else h + self.before)
            self.before = h
            return out

    model, x = Remembers(), torch.randn(B, 5)
    dither.clipped_sum(model, lambda: loss_of(model(x)), strategy=strategy)
    with pytest.raises(errors.CoverageError, match="earlier recording"):
        dither.clipped_sum(model, lambda: loss_of(model(2 * x)), strategy=strategy)


class _Counting(torch.autograd.Function):
    """Counts the backward passes. (A hook, which may decide otherwise each time, would be proved in every step.)"""

    passes = 0

    @staticmethod
    def forward(ctx, losses):
        return losses.view_as(losses)

    @staticmethod
    def backward(ctx, gradient):
        _Counting.passes += 1
        return gradient


@pytest.mark.parametrize("prediction", ["epsilon", "edm", "flow"])
def test_rows_picked_from_data_alone_are_decided_once(prediction):
    """A diffusion loss picks noise levels by timestep and repeats images: the model's places do not follow them."""
    model = dit("DiT-digits", input_size=8, in_channels=1, num_classes=10, learn_sigma=False)
    loss = DiffusionLoss(Process(prediction=prediction), multiplicity=2, num_classes=10)
    batch, decided = (torch.randn(B, 1, 8, 8), torch.arange(B)), []
    for _ in range(8):
        _Counting.passes = 0
        dither.clipped_sum(model, lambda: _Counting.apply(loss(model, batch)))
        decided.append(_Counting.passes)
    # proved anew at calls 1, 2, 4 and 8, a backward pass for every split of the examples
    assert [step + 1 for step, passes in enumerate(decided) if passes > 1] == [1, 2, 4, 8]
