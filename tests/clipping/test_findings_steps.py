"""More ways to be wrong that dither does not notice yet: kept layouts, stale outputs, state, values without gradients.

Marked and mended as in `test_findings.py`.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dither
import oracle
from clipping.test_exactness import (
    STRATEGIES,
    Function,
    assert_exact_or_refused,
    assert_refused,
    loss_of,
    removal_moves,
)
from clipping.test_findings import silent
from dither import errors

pytestmark = pytest.mark.usefixtures("double_precision")
each_strategy = pytest.mark.parametrize("strategy", STRATEGIES)
B = 4
STRAIGHT, CROSSED, REVERSED = torch.tensor([[0, 1, 2, 3], [0, 2, 1, 3], [3, 2, 1, 0]])


def two_layers():
    return nn.ModuleList([nn.Linear(5, 5), nn.Linear(5, 5)])


# --- 6. layouts kept for the third step ------------------------------------------------------------


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


RESTORE = {
    "out[order] = h": _index_assignment,
    "rows of a Python list": _python_list,
    "F.embedding(order, h)": lambda h, order: F.embedding(order.argsort(), h),
    "sparse product": _sparse_product,
    "h[numpy array]": lambda h, order: h[order.numpy().argsort()],
    "scatter_reduce": lambda h, order: torch.zeros(B, 5).scatter_reduce(0, order.view(B, 1).expand(B, 5), h, "sum"),
    "index_reduce": lambda h, order: torch.ones(B, 5).index_reduce(0, order, h, "amax", include_self=False),
    "put": lambda h, order: torch.zeros(B, 5).put(order.view(B, 1) * 5 + torch.arange(5), h),
    "dict": lambda h, order: torch.stack([row for _, row in sorted(zip(order.tolist(), h.unbind(0), strict=True))]),
}


@each_strategy
@pytest.mark.parametrize("how", RESTORE)
@silent("rows restored by data after the first layer; the layouts kept from the first step are used in the third")
def test_rows_restored_in_another_order_on_a_later_step(how, strategy):
    model, x, scale = two_layers(), torch.randn(B, 5), torch.arange(1.0, B + 1).unsqueeze(1)
    for order in (STRAIGHT, STRAIGHT, REVERSED):

        def loss_fn(order=order):
            return loss_of(model[1](RESTORE[how](model[0](x[order]), order).tanh()) * scale)

        truth = oracle.clipped_sum(oracle.per_example_gradients(model, loss_fn), 0.5)
        try:
            result = dither.clipped_sum(model, loss_fn, max_grad_norm=0.5, strategy=strategy)
        except errors.CaptureError:
            return
        assert oracle.relative_error(result.gradients, truth) <= 1e-10


@each_strategy
@silent("two layouts fit what the masked losses reach; one is kept, and wrong once the mask opens")
def test_time_first_rows_whose_mask_opens_on_a_later_step(strategy):
    model, x = two_layers(), torch.randn(2, 2, 5)  # as many steps as examples
    for mask in (torch.eye(2).bool(), torch.eye(2).bool(), torch.ones(2, 2).bool()):

        def loss_fn(mask=mask):
            losses = model[1](model[0](x.transpose(0, 1)).tanh()).square().sum(-1)
            return losses.masked_fill(~mask, 0).sum(0)

        truth = oracle.clipped_sum(oracle.per_example_gradients(model, loss_fn), 0.5)
        result = dither.clipped_sum(model, loss_fn, max_grad_norm=0.5, strategy=strategy)
        assert oracle.relative_error(result.gradients, truth) <= 1e-10


@silent("each pair of examples is separated once; later steps send back the first and the last alone")
def test_neighbours_that_are_other_examples_on_a_later_step():
    model, x, scale = two_layers(), torch.randn(B, 5), torch.arange(1.0, B + 1).unsqueeze(1)

    def loss_fn(neighbour):
        h = model[0](x).tanh()
        return loss_of(model[1](h + h[neighbour]) * scale)

    for _ in range(2):
        dither.clipped_sum(model, lambda: loss_fn(STRAIGHT))
    with pytest.raises(errors.CoupledExamplesError):
        dither.clipped_sum(model, lambda: loss_fn(CROSSED))


@silent("coupling behind a gate that is closed in the first two steps and open in the third")
def test_coupling_behind_a_gate_that_opens_on_a_later_step():
    model, x = two_layers(), torch.randn(B, 5)
    closed, opened = torch.tensor(-9.0), torch.tensor(9.0)
    for gate in (closed, closed):
        dither.clipped_sum(model, lambda g=gate: loss_of(model[1](_gated(model[0](x).tanh(), g))))
    with pytest.raises(errors.CoupledExamplesError):
        dither.clipped_sum(model, lambda: loss_of(model[1](_gated(model[0](x).tanh(), opened))))


def _gated(h, gate):
    return h + (h.flip(0) + gate).relu()


@silent("the hook turns the proof's NaN into zero, so the coupling above it is not seen")
def test_coupling_behind_a_hook_that_removes_nan():
    def body(x, w, v):
        h = F.linear(x, w)
        centred = h - h.mean(0)
        centred.register_hook(lambda g: g.nan_to_num(0.0))
        return F.linear(h + centred, v)

    model, x = Function(body, w=(5, 5), v=(3, 5)), torch.randn(B, 5)
    assert_exact_or_refused(model, lambda: loss_of(model(x)))


@each_strategy
@silent("an output recorded in an earlier sum carries no gradient to its parameters any more")
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
    with pytest.raises(errors.CaptureError):
        dither.clipped_sum(model, lambda: loss_of(model(2 * x)), strategy=strategy)


# --- 7. values of other examples that no gradient shows ----------------------------------------------

VALUES = {
    "inputs standardised over the batch": lambda m, x: loss_of(m[1](m[0]((x - x.mean(0)) / x.std(0)).tanh())),
    "detached batch mean": lambda m, x: loss_of(m[1]((h := m[0](x)) - h.detach().mean(0))),
    "weights from detached losses": lambda m, x: (v := loss_of(m[1](m[0](x)))) * v.detach().softmax(0),
    "a Python number of the batch": lambda m, x: loss_of(m[1]((h := m[0](x)) * float(h.std()))),
    "mixup": lambda m, x: loss_of(m[1](m[0](0.7 * x + 0.3 * x.roll(1, 0)).tanh())),
    "targets from the batch": lambda m, x: (m[0](x) - x.mean(0)).square().sum(1),
}


@pytest.mark.parametrize("how", VALUES)
@silent("a value, not a gradient, carries the other examples; the sum moves by up to 3.4 C")
def test_values_of_other_examples_are_refused(how):
    model, x = two_layers(), torch.randn(B, 5)
    x[0] *= 50
    try:
        moved = removal_moves(model, lambda k: VALUES[how](model, x[k]), B, 0, 1.0, "auto")
    except errors.CaptureError:
        return
    assert moved <= 1 + 1e-9


# --- 8. state updated from the data -------------------------------------------------------------------


def _set_data(module, x):
    module.kept.data = x.mean(0)


def _rebind(module, x):
    module.kept = 0.9 * module.kept + x.mean(0)


UPDATES = {
    "reassigned": _rebind,
    ".data of it": _set_data,
    ".data in place": lambda m, x: m.kept.data.add_(x.mean(0)),
    ".detach() in place": lambda m, x: m.kept.detach().add_(x.mean(0)),
    "out=": lambda m, x: torch.add(m.kept, x.mean(0), out=m.kept),
    "set_": lambda m, x: m.kept.set_(x.mean(0)),
    "foreach": lambda m, x: torch._foreach_add_([m.kept], [x.mean(0)]),
    "numpy": lambda m, x: m.kept.numpy().__setitem__(slice(None), x.mean(0).numpy()),
    "a number": lambda m, x: m.kept.fill_(x.mean().item()),
    "torch.batch_norm": lambda m, x: torch.batch_norm(x, None, None, m.kept, m.kept + 1, True, 0.1, 1e-5, False),
    "instance norm": lambda m, x: F.instance_norm(x.unsqueeze(2).expand(-1, -1, 3), m.kept, m.kept.abs() + 1),
    "frozen parameter": lambda m, x: m.frozen.data.lerp_(x.mean(0), 0.1),
    "frozen parameter, no .data": lambda m, x: m.frozen.lerp_(x.mean(0), 0.1),
    "trained parameter": lambda m, x: m.trained.data.add_(x.mean(0)),
}


class Updated(nn.Module):
    def __init__(self, update):
        super().__init__()
        self.inner, self.update = nn.Linear(5, 3), update
        self.frozen, self.trained = nn.Parameter(torch.rand(5), requires_grad=False), nn.Parameter(torch.rand(5))
        self.register_buffer("kept", torch.rand(5))

    def forward(self, x):
        with torch.no_grad():
            self.update(self, x)
        return self.inner(x * self.trained * self.frozen)


@pytest.mark.parametrize("how", UPDATES)
@silent("only methods that end in an underscore and index assignment are watched, and only on buffers")
def test_state_updated_from_data_is_refused(how):
    model, x = Updated(UPDATES[how]), torch.randn(B, 5)
    before = [t.clone() for t in (model.kept, model.frozen, model.trained)]
    try:
        dither.clipped_sum(model, lambda: loss_of(model(x)))
    except errors.CaptureError:
        return
    after = (model.kept, model.frozen, model.trained)
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True)), "data moved the model's state"


@pytest.mark.parametrize("layer", [nn.InstanceNorm1d(6, affine=True, track_running_stats=True)])
@silent("InstanceNorm's running statistics are updated inside F.instance_norm")
def test_instance_norm_that_tracks_statistics_is_refused(layer):
    layer.double()
    assert_refused(layer, lambda: loss_of(layer(torch.randn(B, 6, 5))), errors.BufferUpdateError)
