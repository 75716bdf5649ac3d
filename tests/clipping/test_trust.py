"""Rows of trust.md that the foundation's rules reach: exact, or a named error."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dither
import oracle
from dither import errors

STRATEGIES = ("auto", "hold", "ghost", "tile", "two_pass")


pytestmark = pytest.mark.usefixtures("double_precision")


def assert_exact(model, loss_fn, max_grad_norm=0.5):
    state = torch.get_rng_state()
    truth = oracle.per_example_gradients(model, loss_fn)
    expected = oracle.clipped_sum(truth, max_grad_norm)
    for strategy in STRATEGIES:
        torch.set_rng_state(state)
        result = dither.clipped_sum(model, loss_fn, max_grad_norm=max_grad_norm, strategy=strategy)
        assert oracle.relative_error(result.gradients, expected) <= 1e-10, strategy


class Several(nn.Module):
    """Raw parameters on the top module, several inputs, an optional one, ints, bools and None, dropout inside."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.randn(4))
        self.first = nn.Linear(3, 4)
        self.second = nn.Linear(3, 4)
        self.unused = nn.Linear(2, 2)

    def forward(self, x, other=None, *, repeat: int = 1, flip: bool = False, note: str | None = None):
        h = self.first(x) * self.scale
        if other is not None:
            h = h + self.second(other)
        h = F.dropout(h, 0.5, self.training)
        for _ in range(repeat):
            h = h.tanh()
        return {"out": (h.flip(-1) if flip else h, note)}


def test_several_inputs_keywords_optional_and_non_tensor():
    model, x, other = Several(), torch.randn(5, 3), torch.randn(5, 3)
    assert_exact(model, lambda: model(x, other=other, repeat=2, flip=True)["out"][0].square().sum(1))
    assert_exact(model, lambda: model(x=x)["out"][0].square().sum(1))  # `second` unused on a later step


def test_optional_input_used_later_and_layer_added_and_parameter_unfrozen():
    model, x = Several(), torch.randn(5, 3)
    model.first.weight.requires_grad_(False)
    assert_exact(model, lambda: model(x)["out"][0].square().sum(1))
    model.first.weight.requires_grad_(True)
    model.extra = nn.Linear(4, 2)
    assert_exact(model, lambda: model.extra(model(x)["out"][0]).square().sum(1))


def test_tied_weights_and_module_call_plus_functional():
    table = nn.Embedding(7, 4)
    head = nn.Linear(4, 7)
    head.weight = table.weight
    model, ids = nn.ModuleList([table, head]), torch.randint(7, (5, 6))
    assert_exact(model, lambda: head(table(ids).tanh()).flatten(1).square().mean(1))
    layer, x = nn.Linear(4, 4), torch.randn(5, 3, 4)
    assert_exact(layer, lambda: F.linear(layer(x).tanh(), layer.weight).flatten(1).square().mean(1))


def test_eval_then_train():
    model, x = Several().eval(), torch.randn(5, 3)
    assert_exact(model, lambda: model(x)["out"][0].square().sum(1))
    model.train()
    assert_exact(model, lambda: model(x)["out"][0].square().sum(1))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_an_example_that_is_not_finite_is_dropped_and_counted(strategy, value):
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.LayerNorm(4))
    x = torch.randn(5, 6, 3)
    bad = x.clone()
    bad[2, 1] = value
    others = torch.cat([x[:2], x[3:]])
    expected = dither.clipped_sum(model, lambda: model(others).square().flatten(1).sum(1))
    result = dither.clipped_sum(model, lambda: model(bad).square().flatten(1).sum(1), strategy=strategy)
    assert result.dropped == 1 and not torch.isfinite(result.norms[2])
    assert oracle.relative_error(result.gradients, expected.gradients) <= 1e-10


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("scale", [1e30, 1e-30, 0.0])
def test_extreme_gradients_move_the_sum_by_at_most_the_bound(strategy, scale):
    torch.set_default_dtype(torch.float32)
    model, x, bound = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(4, 5, 3), 0.3
    weights = torch.ones(4)
    weights[1] = scale

    def loss(keep):
        return lambda: model(x[keep]).flatten(1).sum(1) * weights[keep]

    all_, without = [0, 1, 2, 3], [0, 2, 3]
    one = dither.clipped_sum(model, loss(all_), max_grad_norm=bound, strategy=strategy)
    two = dither.clipped_sum(model, loss(without), max_grad_norm=bound, strategy=strategy)
    moved = sum((one.gradients[n] - two.gradients[n]).double().square().sum() for n in one.gradients).sqrt()
    assert one.dropped == 0
    assert moved <= bound * (1 + 1e-5)
    if scale == 1e30:
        assert moved >= bound * (1 - 1e-5)


def test_ghost_norms_survive_cancellation():
    torch.set_default_dtype(torch.float32)
    model = nn.Linear(16, 16, bias=False)
    x = torch.randn(2, 64, 16)
    x[:, 32:] = x[:, :32]
    sign = torch.cat([torch.ones(32), -torch.ones(32)])[None, :, None] + 1e-4 * torch.randn(2, 64, 16)

    def loss_fn():
        return (model(x) * sign * 100).flatten(1).sum(1)

    truth = oracle.norms(
        oracle.per_example_gradients(
            model.double(), lambda: (model(x.double()) * sign.double() * 100).flatten(1).sum(1)
        )
    )
    model.float()
    norms = dither.clipped_sum(model, loss_fn, strategy="ghost").norms.double()
    torch.testing.assert_close(norms, truth, rtol=1e-3, atol=0)
    held = dither.clipped_sum(model, loss_fn, strategy="hold").norms.double()
    assert (norms - truth).abs().max() <= 2 * (held - truth).abs().max() + 1e-4 * truth.max()


# --- refused -------------------------------------------------------------------------------------


def test_batch_statistics_in_the_model_are_refused():
    x = torch.randn(4, 3, 5, 5)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.Conv2d(4, 2, 1))
    with pytest.raises(errors.CoupledExamplesError, match="batch normalisation"):
        dither.clipped_sum(model, lambda: model(x).flatten(1).sum(1))


def test_running_statistics_are_refused():
    x = torch.randn(4, 3, 5, 5)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    with pytest.raises(errors.CaptureError):
        dither.clipped_sum(model, lambda: model(x).flatten(1).sum(1))


def test_batch_statistics_in_the_loss_are_refused():
    model, x = nn.Linear(3, 2), torch.randn(4, 3)
    with pytest.raises(errors.CoupledExamplesError):
        dither.clipped_sum(model, lambda: (model(x) - model(x).mean(0)).square().sum(1))


@pytest.mark.parametrize("pair", [(i, j) for i in range(6) for j in range(6) if i != j])
def test_one_example_that_reaches_into_another_is_refused(pair):
    model, x = nn.Linear(3, 2), torch.randn(6, 3)
    i, j = pair

    def loss_fn():
        losses = model(x).square().sum(1)
        return losses + F.one_hot(torch.tensor(i), 6) * losses[j] * 1e-30

    with pytest.raises(errors.CoupledExamplesError):
        dither.clipped_sum(model, loss_fn)


def test_coupling_behind_a_weight_that_is_zero_is_refused():
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2, track_running_stats=False), nn.Linear(2, 2))
    nn.init.zeros_(model[2].weight)
    x = torch.randn(4, 3)
    with pytest.raises(errors.CoupledExamplesError):
        dither.clipped_sum(model, lambda: model(x).sum(1))


@pytest.mark.parametrize("reduce", [lambda x: x.mean(), lambda x: x, lambda x: None, lambda x: x.sum(1).long()])
def test_a_loss_that_is_not_one_number_per_example_is_refused(reduce):
    model, x = nn.Linear(3, 2), torch.randn(4, 3)
    with pytest.raises(errors.LossShapeError, match="one loss per example"):
        dither.clipped_sum(model, lambda: reduce(model(x)))


def test_a_gradient_around_the_recorder_is_refused_and_leaves_no_trace():
    class Hidden(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, w):
            ctx.save_for_backward(x, w)
            return x @ w

        @staticmethod
        def backward(ctx, g):
            x, w = ctx.saved_tensors
            return g @ w.T, x.T @ g

    model, x = nn.Linear(3, 3), torch.randn(4, 3)
    model.weight.grad = torch.ones(3, 3)
    with pytest.raises(errors.CoverageError, match="weight"):
        dither.clipped_sum(model, lambda: Hidden.apply(model(x), model.weight).sum(1))
    assert torch.equal(model.weight.grad, torch.ones(3, 3)) and model.bias.grad is None


def test_a_forward_outside_the_loss_function_is_refused():
    model, x = nn.Linear(3, 2), torch.randn(4, 3)
    stale = model(x)
    with pytest.raises(errors.CoverageError):
        dither.clipped_sum(model, lambda: stale.sum(1))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_saved_input_changed_in_place_is_refused(strategy):
    model, x = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)]), torch.randn(4, 3)

    def loss_fn():
        h = model[0](x) * 1
        y = model[1](h)
        h.data.mul_(2) if False else h.detach().mul_(2)
        return y.sum(1)

    with pytest.raises(errors.SavedInputChangedError, match="in place"):
        dither.clipped_sum(model, loss_fn, strategy=strategy)


def test_activation_checkpoints_are_exact_or_refused():
    from torch.utils.checkpoint import checkpoint

    model, x = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)), torch.randn(4, 3, requires_grad=True)
    for reentrant in (False, True):
        with pytest.raises(errors.CoverageError, match="checkpoint"):
            dither.clipped_sum(model, lambda r=reentrant: checkpoint(model, x, use_reentrant=r).sum(1))
    assert all(p.grad is None for p in model.parameters())


def test_nested_recordings_and_inner_backward_are_refused():
    model, x = nn.Linear(3, 2), torch.randn(4, 3)
    with pytest.raises(errors.NestedRecorderError):
        dither.clipped_sum(model, lambda: dither.clipped_sum(model, lambda: model(x).sum(1)).norms)
    with pytest.raises(errors.NestedRecorderError):
        dither.clipped_sum(model, lambda: torch.autograd.grad(model(x).sum(), model.weight)[0].sum(1))
    assert dither.clipped_sum(model, lambda: model(x).sum(1)).norms.shape == (4,)  # the recorder is free again


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
    with pytest.raises(errors.ConfigurationError, match="into"):
        dither.clipped_sum(model, loss_fn, into={"weight": torch.zeros(3, 2)})
    model.requires_grad_(False)
    with pytest.raises(errors.ConfigurationError, match="trainable"):
        dither.clipped_sum(model, loss_fn)


def test_examples_on_an_axis_that_an_operation_mixes_are_refused():
    x = torch.randn(3, 7, 4)  # (features, length, B)
    conv = nn.Conv1d(7, 5, 1)
    with pytest.raises(errors.ExampleAxisError):
        dither.clipped_sum(conv, lambda: conv(x).square().sum((0, 1)))
    linear = nn.Linear(3, 4)
    with pytest.raises(errors.CaptureError):  # the output features are called examples
        dither.clipped_sum(linear, lambda: linear(torch.randn(6, 3)).square().sum(0))
