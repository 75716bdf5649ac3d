"""Buffers: constants are used as they are, also changed without data; one that is updated from the data is refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from clipping.test_exactness import assert_exact, assert_refused, loss_of
from dither import errors

pytestmark = pytest.mark.usefixtures("double_precision")
B = 4


class Buffered(nn.Module):
    """A linear layer and a buffer that `update(buffer, x)` may change on every forward."""

    def __init__(self, update):
        super().__init__()
        self.inner = nn.Linear(5, 3)
        self.register_buffer("kept", torch.rand(5))
        self.update = update

    def forward(self, x):
        self.update(self.kept, x)
        return self.inner(x * self.kept.clone())


def _under_no_grad(buffer, x):
    with torch.no_grad():
        buffer.mul_(0.9).add_(x.mean(0), alpha=0.1)


IN_PLACE = {
    "copy_": lambda b, x: b.copy_(x.mean(0)),
    "under no_grad": _under_no_grad,
    "index": lambda b, x: b.__setitem__(slice(None), x.mean(0)),
    "one entry": lambda b, x: b.__setitem__(0, x.mean()),
    "through a view": lambda b, x: b.view(-1)[0].add_(x.mean()),
    "lerp_": lambda b, x: b.lerp_(x.mean(0), 0.1),
    "fill_ with a tensor": lambda b, x: b.fill_(x.mean()),
    "operator": lambda b, x: b.__iadd__(x.mean(0)),
    "of one example": lambda b, x: b.add_(x[0]),
    "a detached input": lambda b, x: b.add_(x.detach().mean(0)),
}


@pytest.mark.parametrize("how", IN_PLACE)
def test_buffer_updated_in_place_from_data_is_refused(how):
    model, x = Buffered(IN_PLACE[how]), torch.randn(B, 5)
    before = model.kept.clone()
    assert_refused(model, lambda: loss_of(model(x)), errors.BufferUpdateError, match="buffer")
    if how != "under no_grad":  # its first operation is without data
        assert torch.equal(model.kept, before)  # refused before the data reached it


WITHOUT_DATA = {
    "nothing": lambda b, x: None,
    "counted": lambda b, x: b.add_(1),
    "decayed": lambda b, x: b.mul_(0.9),
    "from constants": lambda b, x: b.copy_(torch.arange(5.0)),
    "from the batch size": lambda b, x: b.fill_(float(x.shape[0])),
}


@pytest.mark.parametrize("how", WITHOUT_DATA)
def test_constant_buffers_are_exact(how):
    model, x = Buffered(WITHOUT_DATA[how]), torch.randn(B, 5)
    kept = model.kept.clone()
    assert_exact(model, lambda: loss_of(model(x)), before=lambda: model.kept.data.copy_(kept))


class Constants(nn.Module):
    """Buffers where a parameter meets them: a table of positions as long as the batch, a mask, statistics, indices."""

    def __init__(self):
        super().__init__()
        self.scale, self.table = nn.Parameter(torch.randn(5)), nn.Parameter(torch.randn(7, 5))
        self.inner = nn.Linear(5, 5)
        self.register_buffer("positions", torch.randn(B, 5))  # T equals B
        self.register_buffer("mask", torch.ones(5, 5).tril())
        self.register_buffer("mean", torch.randn(5))
        self.register_buffer("order", torch.tensor([0, 6, 2, 2]), persistent=False)

    def forward(self, x):
        x = F.layer_norm(x, (5,)) - self.mean + self.positions * self.scale
        return F.linear(x, self.inner.weight * self.mask, self.inner.bias) + self.table[self.order]


def test_buffers_that_meet_parameters_are_constants():
    model, x = Constants(), torch.randn(B, B, 5)
    assert_exact(model, lambda: loss_of(model(x)))


def test_statistics_in_eval_mode_are_constants():
    model, x = nn.Sequential(nn.Conv2d(2, 4, 2), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)), torch.randn(B, 2, 4, 4)
    model(x + 1)
    model.eval()
    statistics = model[1].running_mean.clone()
    assert statistics.any()
    assert_exact(model, lambda: loss_of(model(x)))
    assert torch.equal(model[1].running_mean, statistics)


def test_statistics_taken_under_no_grad_are_refused():
    class Tracks(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.norm = nn.Linear(5, 3), nn.BatchNorm1d(5, affine=False)

        def forward(self, x):
            with torch.no_grad():
                self.norm(x)
            return self.inner(x)

    model, x = Tracks(), torch.randn(B, 5)
    assert_refused(model, lambda: loss_of(model(x)), errors.CoupledExamplesError)
    assert not model.norm.running_mean.any()


def _rebind(module, x):
    module.kept = 0.9 * module.kept + x.mean(0)


STATE = {
    "a buffer reassigned": _rebind,
    ".detach() in place": lambda m, x: m.kept.detach().add_(x.mean(0)),
    "out=": lambda m, x: torch.add(m.kept, x.mean(0), out=m.kept),
    "set_": lambda m, x: m.kept.set_(x.mean(0)),
    "foreach": lambda m, x: torch._foreach_add_([m.kept], [x.mean(0)]),
    "instance norm": lambda m, x: F.instance_norm(x.unsqueeze(2).expand(-1, -1, 3), m.kept, m.kept.abs() + 1),
    "a frozen parameter": lambda m, x: m.frozen.lerp_(x.mean(0), 0.1),
}


class Updated(nn.Module):
    """A buffer and a frozen parameter that `update(module, x)` changes on every forward, without gradients."""

    def __init__(self, update):
        super().__init__()
        self.inner, self.update = nn.Linear(5, 3), update
        self.frozen, self.trained = nn.Parameter(torch.rand(5), requires_grad=False), nn.Parameter(torch.rand(5))
        self.register_buffer("kept", torch.rand(5))

    def forward(self, x):
        with torch.no_grad():
            self.update(self, x)
        return self.inner(x * self.trained * self.frozen)


@pytest.mark.parametrize("how", STATE)
def test_state_updated_from_data_is_refused(how):
    model, x = Updated(STATE[how]), torch.randn(B, 5)
    assert_refused(model, lambda: loss_of(model(x)), errors.BufferUpdateError)


def test_instance_norm_that_tracks_statistics_is_refused():
    layer, x = nn.InstanceNorm1d(6, affine=True, track_running_stats=True), torch.randn(B, 6, 5)
    assert_refused(layer, lambda: loss_of(layer(x)), errors.BufferUpdateError)
    layer.eval()
    assert_exact(layer, lambda: loss_of(layer(x)))


def test_functional_batch_norm_that_tracks_statistics_is_refused():
    update = lambda m, x: torch.batch_norm(x, None, None, m.kept, m.kept + 1, True, 0.1, 1e-5, False)  # noqa: E731
    model, x = Updated(update), torch.randn(B, 5)
    assert_refused(model, lambda: loss_of(model(x)), errors.CoupledExamplesError)


# --- parameters that are made of the model's own memory ------------------------------------------------


class Magnitude(nn.Module):
    """A frozen weight whose columns get trained lengths; `made` makes the weight that the lengths are divided by."""

    def __init__(self, made):
        super().__init__()
        self.made, self.frozen = made, nn.Parameter(torch.randn(5, 5), requires_grad=False)
        self.register_buffer("kept", torch.rand(5, 5))
        self.length = nn.Parameter(torch.rand(5))

    def forward(self, x):
        norm = torch.linalg.norm(self.made(self, x), dim=1).detach()
        return F.linear(x, self.frozen) * (self.length / norm)


MADE = {
    "the frozen weight": lambda m, x: nn.Parameter(m.frozen),
    "transposed": lambda m, x: nn.Parameter(m.frozen.T),
    "a buffer, with another axis": lambda m, x: nn.Parameter(m.kept[None])[0],
    "frozen": lambda m, x: nn.Parameter(m.frozen.T, requires_grad=False),
}


@pytest.mark.parametrize("how", MADE)
def test_a_parameter_that_is_a_constants_memory_is_a_constant(how):
    model, x = Magnitude(MADE[how]), torch.randn(B, 5)
    assert_exact(model, lambda: loss_of(model(x)))


def test_a_parameter_made_of_the_examples_is_none():
    model = Magnitude(lambda m, x: nn.Parameter((x.T @ x).detach()))
    x = torch.randn(B, 5)
    assert_refused(model, lambda: loss_of(model(x)), errors.CaptureError)
    model.made = lambda m, x: nn.Parameter(m.frozen.T) * x.std(0)
    assert_refused(model, lambda: loss_of(model(x)), errors.CaptureError)


def test_examples_kept_beside_a_buffer_are_no_constant():
    memory, x = torch.randn(10, 5), torch.randn(B, 5)
    model = Magnitude(lambda m, x: nn.Parameter(memory[5:]))
    model.register_buffer("kept", memory[:5])
    assert_refused(model, lambda: loss_of(model(x)), errors.CaptureError)


def test_state_updated_through_a_parameter_of_its_memory_is_refused():
    model, x = Updated(lambda m, x: nn.Parameter(m.kept, requires_grad=False).mul_(x.mean(0))), torch.randn(B, 5)
    assert_refused(model, lambda: loss_of(model(x)), errors.BufferUpdateError)
