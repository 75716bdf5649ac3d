"""Standard mode: `.grad_sample` of shape (B, *shape) after an ordinary `loss.backward()`."""

from __future__ import annotations

import copy
import gc
import pickle
from collections import OrderedDict

import opacus
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import oracle
from dither import errors
from dither.opacus import DPOptimizer, GradSampleHooks, GradSampleModule, GradSampleModuleExpandedWeights

KINDS = (GradSampleModule, GradSampleModuleExpandedWeights)


pytestmark = pytest.mark.usefixtures("double_precision")


class Anything(nn.Module):
    """Several inputs of every kind, a raw parameter, dropout, a nested output."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.unused = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(2, 2)
        self.scale = nn.Parameter(torch.randn(4))

    def forward(self, x, other=None, *, repeat: int = 1, flip: bool = False, note=None):
        h = self.first(x) * self.scale
        h = h if other is None else h + self.second(other["tokens"])
        h = F.dropout(h, 0.3, self.training)
        for _ in range(repeat):
            h = h.tanh()
        return {"out": (h.flip(-1) if flip else h, note)}


def samples(wrapped) -> dict:
    names = {n: p for n, p in wrapped._module.named_parameters() if p.requires_grad}
    return {n: p.grad_sample for n, p in names.items()}


def assert_exact(model, losses, kind=GradSampleModule, reduction="mean", tolerance=1e-10):
    state = torch.get_rng_state()
    truth = oracle.per_example_gradients(model, lambda: losses(model))
    wrapped = kind(model, loss_reduction=reduction)
    torch.set_rng_state(state)
    value = losses(wrapped)
    (value.mean() if reduction == "mean" else value.sum()).backward()
    assert oracle.relative_error(samples(wrapped), truth) <= tolerance
    scale = len(value) if reduction == "mean" else 1
    grads = {n: p.grad * scale for n, p in model.named_parameters() if p.grad is not None}
    sums = {n: truth[n].sum(0) for n in grads}
    assert oracle.relative_error(grads, sums) <= tolerance
    return wrapped


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_any_input_and_any_output(kind, reduction):
    x, other = torch.randn(5, 3), {"tokens": torch.randn(5, 3)}
    assert_exact(
        Anything(),
        lambda m: m(x, other=other, repeat=2, flip=True, note="a")["out"][0].square().sum(1),
        kind,
        reduction,
    )
    wrapped = assert_exact(Anything(), lambda m: m(x=x, other=None)["out"][0].square().sum(1), kind, reduction)
    assert all(not s.any() for s in (samples(wrapped)["second.weight"], samples(wrapped)["unused.bias"]))


class Output(OrderedDict):
    """As transformers has it: a dictionary whose entries are attributes."""

    def __getattr__(self, name):
        return self[name]


def test_inputs_in_other_containers():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, states, deep):
            for _ in range(12):
                (deep,) = deep
            return self.layer(states.hidden.type_as(self.layer.weight).to(self.layer.weight)) * deep

    x, deep = torch.randn(5, 3), torch.randn(5, 2)
    for _ in range(12):
        deep = [deep]
    assert_exact(Model(), lambda m: m(Output(hidden=x), deep).square().sum(1))
    assert_exact(Model(), lambda m: m(Output(hidden=x.clone().requires_grad_()), deep).square().sum(1))
    assert not x.requires_grad


def test_batch_first_false():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.LayerNorm(4), nn.Linear(4, 2))
    x = torch.randn(7, 5, 3)  # time, examples, features
    truth = oracle.per_example_gradients(model, lambda: model(x).square().sum((0, 2)))
    wrapped = GradSampleModule(model, batch_first=False)
    wrapped(x).square().sum((0, 2)).mean().backward()
    assert oracle.relative_error(samples(wrapped), truth) <= 1e-10


def test_unmodified_attention_and_transformer_layers():
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.2)
    x, mask = torch.randn(4, 6, 8), torch.zeros(4, 6, dtype=torch.bool)
    mask[1, 4:] = True
    assert_exact(model, lambda m: m(x, src_key_padding_mask=mask).square().flatten(1).mean(1))


def test_accumulation_keeps_batches_apart_and_zero_grad_clears():
    model, x = nn.Linear(3, 2), torch.randn(4, 3)
    wrapped = GradSampleModule(model)
    for size in (4, 2):
        wrapped(x[:size]).square().sum(1).mean().backward()
    assert [len(s) for s in model.weight.grad_sample] == [4, 2]
    wrapped.zero_grad()
    assert model.weight.grad_sample is None and not model.weight.grad.any()
    wrapped.forbid_grad_accumulation()
    wrapped(x).square().sum(1).mean().backward()
    with pytest.raises(ValueError, match="Poisson sampling is not compatible with grad accumulation"):
        wrapped(x).square().sum(1).mean().backward()


def test_two_forwards_in_one_loss_add_per_example():
    model, x, z = nn.Linear(3, 2), torch.randn(4, 3), torch.randn(4, 3)
    assert_exact(model, lambda m: m(x).square().sum(1) + m(z).tanh().sum(1))


def test_an_empty_batch_has_gradients_of_no_example():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    wrapped = GradSampleModule(model)
    optimizer = DPOptimizer(
        torch.optim.SGD(model.parameters(), lr=1.0), noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=4
    )
    before = copy.deepcopy(model.state_dict())
    wrapped(torch.zeros(0, 3)).sum().backward()
    assert {n: tuple(s.shape) for n, s in samples(wrapped).items()} == {n: (0, *p.shape) for n, p in before.items()}
    optimizer.step()
    assert all((model.state_dict()[n] != before[n]).all() for n in before)  # noise alone


def test_hooks_off_gives_ordinary_gradients():
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(4, 3)
    plain = torch.autograd.grad(model(x).square().mean(), list(model.parameters()))
    wrapped = GradSampleModule(model)
    out = wrapped(x)  # recorded
    wrapped.disable_hooks()
    out.square().mean().backward()
    for parameter, gradient in zip(model.parameters(), plain, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
        assert parameter.grad_sample is None
    wrapped.zero_grad()
    wrapped(x).square().mean().backward()  # not recorded
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), plain, strict=True))
    wrapped.enable_hooks()
    wrapped(x).square().mean().backward()
    assert model[0].weight.grad_sample.shape == (4, 4, 3)


def test_to_standard_module_leaves_no_trace():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    keys = [vars(module).keys() for module in model.modules()]
    attributes = [set(vars(p)) for p in model.parameters()]
    gc.collect()  # earlier tests' modules
    backward = torch.autograd.backward
    wrapped = GradSampleModule(model)
    wrapped(torch.randn(2, 3)).sum().backward()
    assert wrapped.to_standard_module() is model and torch.autograd.backward is backward
    assert [vars(module).keys() for module in model.modules()] == keys
    assert [set(vars(p)) for p in model.parameters()] == attributes
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_module_that_is_forgotten_leaves_autograd_as_it_was():
    gc.collect()  # earlier tests' modules
    functions = torch.autograd.backward, torch.autograd.grad
    wrapped = GradSampleModule(nn.Linear(3, 2))
    wrapped(torch.randn(2, 3)).sum().backward()
    assert torch.autograd.backward is not functions[0]
    del wrapped
    gc.collect()
    assert (torch.autograd.backward, torch.autograd.grad) == functions


def test_a_pass_goes_on_when_the_last_module_is_collected():
    gc.collect()  # earlier tests' modules
    wrapped = GradSampleModule(nn.Linear(3, 2))
    met, x = torch.autograd.backward, torch.ones(2, requires_grad=True)
    del wrapped
    gc.collect()
    met(x.sum())
    assert torch.equal(x.grad, torch.ones(2)) and torch.autograd.backward is not met
    assert_exact(nn.Linear(3, 2), lambda model: model(torch.ones(4, 3)).square().sum(1))


def test_hooks_object_without_a_wrapper():
    model, x = Anything(), torch.randn(5, 3)
    state = torch.get_rng_state()
    truth = oracle.per_example_gradients(model, lambda: model(x)["out"][0].square().sum(1))
    hooks = GradSampleHooks(model)
    torch.set_rng_state(state)
    model(x)["out"][0].square().sum(1).mean().backward()
    got = {n: p.grad_sample for n, p in model.named_parameters()}
    assert oracle.relative_error(got, truth) <= 1e-10
    assert isinstance(hooks, opacus.grad_sample.GradSampleHooks)
    hooks.cleanup()
    assert not hasattr(model.scale, "grad_sample")


def test_copies_and_pickles_record_for_themselves():
    x = torch.randn(4, 3)
    wrapped = GradSampleModule(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))
    wrapped(x).square().sum().backward()
    for twin in (copy.deepcopy(wrapped), pickle.loads(pickle.dumps(wrapped))):
        twin.zero_grad()
        twin(x).square().sum().backward()
        for ours, theirs in zip(twin.parameters(), wrapped.parameters(), strict=True):
            assert ours is not theirs
            torch.testing.assert_close(ours.grad_sample, theirs.grad_sample)
    assert isinstance(wrapped.grad_accumulation_hook, type(None))


def test_a_parameter_unfrozen_and_a_layer_added_after_wrapping():
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh()), torch.randn(4, 3)
    model[0].bias.requires_grad_(False)
    wrapped = GradSampleModule(model)
    model[0].bias.requires_grad_(True)
    model.append(nn.Linear(4, 2))
    wrapped.disable_hooks()
    truth = oracle.per_example_gradients(model, lambda: model(x).square().sum(1))
    wrapped.enable_hooks()
    wrapped(x).square().sum(1).mean().backward()
    assert oracle.relative_error(samples(wrapped), truth) <= 1e-10


def test_a_frozen_parameter_takes_no_step_with_an_old_gradient():
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), torch.randn(4, 3)
    model(x).square().sum().backward()
    model[0].requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    wrapped = GradSampleModule(model)
    optimizer = DPOptimizer(
        torch.optim.SGD(wrapped.parameters(), lr=1.0), noise_multiplier=1.0, max_grad_norm=0.1, expected_batch_size=4
    )
    wrapped(x).square().sum(1).mean().backward()
    optimizer.step()
    moved = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])]
    assert moved == ["1.weight", "1.bias"]


def test_an_example_that_is_not_finite_is_left_out():
    model, x = nn.Linear(3, 2), torch.randn(4, 3)
    bad = torch.cat([x, torch.full((1, 3), float("nan"))])
    sums = []
    for data in (x, bad):
        wrapped = GradSampleModule(copy.deepcopy(model))
        optimizer = DPOptimizer(
            torch.optim.SGD(wrapped.parameters(), lr=1.0),
            noise_multiplier=0.0,
            max_grad_norm=0.1,
            expected_batch_size=4,
        )
        wrapped(data).square().sum(1).mean().backward()
        optimizer.step()
        sums.append({n: p.summed_grad for n, p in wrapped.named_parameters()})
    assert oracle.relative_error(sums[1], sums[0]) <= 1e-12


# --- refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "loss",
    [
        lambda y: y.square().mean().sqrt(),
        lambda y: (y - y.mean(0)).square().mean(),
        lambda y: -F.cosine_similarity(y, y.roll(1, 0)).mean(),
        lambda y: F.cross_entropy(y @ y.T, torch.arange(len(y))),
        lambda y: y.square().sum(1).max(),
        lambda y: y.square().sum(1).topk(2).values.mean(),
        lambda y: (y.square().mean() - 0.1).abs() + 0.1,
        lambda y: y.sort(0).values[:3].mean(),
        lambda y: F.max_pool1d(y.sum(1)[None], 5).mean(),
        lambda y: y.sum(1).norm(float("inf")),
        lambda y: torch.fmax(y[:1], y[1:]).mean(),
        lambda y: F.prelu(y - y.flip(0), torch.tensor([0.3])).mean(),
        lambda y: y.sum(1).logcumsumexp(0)[-1],
    ],
    ids=[
        "root of the mean",
        "centred",
        "pairs",
        "in-batch negatives",
        "hardest example",
        "hardest two",
        "flooding",
        "sorted",
        "pooled",
        "largest",
        "larger",
        "differences",
        "cumulated",
    ],
)
def test_a_loss_that_couples_examples_is_refused(loss):
    wrapped = GradSampleModule(nn.Linear(3, 2))
    with pytest.raises(errors.CoupledExamplesError):
        loss(wrapped(torch.randn(5, 3))).backward()


def test_a_loss_that_couples_examples_through_their_extremes_is_refused():
    wrapped = GradSampleModule(nn.Linear(3, 2))
    with pytest.raises((errors.CoupledExamplesError, errors.CoverageError)):  # torch 2.6 differentiates aminmax once
        wrapped(torch.randn(5, 3)).sum(1).aminmax().max.backward()


@pytest.mark.parametrize(
    "losses",
    [
        lambda y: y.abs().sum(1),
        lambda y: y.max(1).values + y.amin(1),
        lambda y: y.topk(2, dim=1).values.sum(1),
        lambda y: (y.square().sum(1) - 0.1).abs(),
        lambda y: y.sort(-1).values[:, 0] + y.median(1).values,
        lambda y: torch.maximum(y[:, 0], y[:, 1]).clamp(min=-1),
        lambda y: F.l1_loss(y, torch.zeros_like(y), reduction="none").sum(1),
        lambda y: F.multi_margin_loss(y, torch.tensor([0, 1, 2, 0, 1]), reduction="none") / 2,
        lambda y: F.cross_entropy(y, torch.tensor([0, 1, 2, 0, 1]), label_smoothing=0.1, reduction="none"),
        lambda y: F.log_softmax(y, 1).gather(1, torch.tensor([[0], [1], [2], [0], [1]])).squeeze(1),
    ],
)
def test_a_loss_that_compares_within_an_example_is_exact(losses):
    x = torch.randn(5, 3)
    assert_exact(nn.Linear(3, 3), lambda model: losses(model(x)))


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_losses_without_a_second_derivative(reduction):
    x, y, lengths = torch.randn(5, 9, 3), torch.randint(1, 4, (5, 3)), (torch.full((5,), 9), torch.full((5,), 3))

    def ctc(model, reduction):
        return F.ctc_loss(model(x).log_softmax(-1).transpose(0, 1), y, *lengths, reduction=reduction)

    def margin(model, reduction):
        return F.multi_margin_loss(model(x).mean(1), torch.tensor([0, 1, 2, 0, 1]), reduction=reduction)

    for loss in (ctc, margin):
        model = nn.Linear(3, 4)
        scale = 3 if loss is ctc and reduction == "mean" else 1  # ctc's mean divides by the targets' lengths
        truth = oracle.per_example_gradients(model, lambda m=model, f=loss, s=scale: f(m, "none") / s)
        wrapped = GradSampleModule(model)
        loss(wrapped, reduction).mean().backward()
        assert oracle.relative_error(samples(wrapped), truth) <= 1e-10
    with pytest.raises(errors.CaptureError):
        margin(wrapped, "mean").square().backward()


def test_a_penalty_on_weights_and_gradients_of_gradients_are_refused():
    model = nn.Linear(3, 2)
    wrapped = GradSampleModule(model)
    x = torch.randn(4, 3, requires_grad=True)
    with pytest.raises(errors.CoverageError, match="weight_decay"):
        (wrapped(x).square().mean() + model.weight.square().sum()).backward()
    with pytest.raises(errors.CoverageError, match="gradient penalties"):
        wrapped(x).square().mean().backward(create_graph=True)
    with pytest.raises(errors.CoverageError, match="create_graph"):
        torch.autograd.grad(wrapped(x).square().mean(), x, create_graph=True)
    with pytest.raises(errors.CoverageError, match="disable_hooks"):
        torch.autograd.grad(wrapped(x).square().mean(), list(model.parameters()), allow_unused=True)
    assert torch.autograd.grad(wrapped(x).square().mean(), x)[0].shape == x.shape


def test_two_forwards_of_different_sizes_sent_back_one_after_the_other_are_refused():
    wrapped = GradSampleModule(nn.Linear(3, 2))
    a, b = wrapped(torch.randn(4, 3)), wrapped(torch.randn(3, 3))
    a.mean().backward()
    with pytest.raises(errors.CoverageError, match="one loss"):
        b.mean().backward()


def test_forwards_of_different_sizes_in_one_loss_are_refused():
    wrapped = GradSampleModule(nn.Linear(3, 2))
    with pytest.raises(errors.CoverageError, match="one loss"):
        (wrapped(torch.randn(4, 3)).mean() + wrapped(torch.randn(3, 3)).mean()).backward()


class Tokens(nn.Module):
    """Every layer has a row per token."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.last(self.first(x.flatten(0, 1)).tanh()).unflatten(0, x.shape[:2])


@pytest.mark.parametrize("kind", [GradSampleHooks, GradSampleModule])
def test_a_forward_method_that_is_called_directly_is_refused(kind):
    model, x = Tokens(), torch.randn(5, 7, 3)
    hooks = kind(model)
    with pytest.raises(errors.ExampleAxisError, match=r"model\(x\), not model\.forward\(x\)"):
        model.forward(x)
    model(x).square().mean().backward()
    assert model.first.weight.grad_sample.shape == (5, 4, 3)
    if kind is GradSampleModule:
        hooks.forward(x).square().mean().backward()  # calls the model
    with torch.no_grad():
        model.forward(x)
    hooks.disable_hooks()
    model.forward(x)


def test_a_part_that_alone_computes_gradients_is_no_direct_call():
    class Frozen(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

        @torch.no_grad()
        def forward(self, x):
            hidden = self.body(x)
            with torch.enable_grad():
                return self.head(hidden)

    model, x = Frozen(), torch.randn(5, 3)
    wrapped = GradSampleModule(model)
    wrapped(x).square().sum(1).mean().backward()
    assert model.head.weight.grad_sample.shape == (5, 2, 4)
    with pytest.raises(errors.ExampleAxisError):
        model.forward(x)
    wrapped.head(x.new_ones(5, 4)).sum().backward()  # by itself, not in the model's forward


def test_batch_norm_is_refused_before_training():
    with pytest.raises(NotImplementedError, match=r"ModuleValidator\.fix"):
        GradSampleModule(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)))
    wrapped = GradSampleModule(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, track_running_stats=False)))
    with pytest.raises(errors.CoupledExamplesError):
        wrapped(torch.randn(4, 3)).square().mean().backward()
