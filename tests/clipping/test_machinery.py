"""Compiled code, threads, modes, custom autograd functions, generation in training, randomness."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dither
import oracle
from clipping.test_exactness import STRATEGIES, Function, assert_exact
from dither import errors

pytestmark = pytest.mark.usefixtures("double_precision")


def network():
    return nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.LayerNorm(4), nn.Linear(4, 2))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("what", ["model", "block", "in place"])
def test_compiled_models_are_exact(what, backend):
    torch._dynamo.reset()
    model, x = network(), torch.randn(4, 5, 3)
    if what == "model":
        run = torch.compile(model, backend=backend)
    elif what == "block":
        last = torch.compile(model[3], backend=backend)
        run = lambda x: last(model[:3](x))  # noqa: E731
    else:
        model.compile(backend=backend)
        run = model
    for _ in range(2):  # compiled by the reference, in between
        assert_exact(model, lambda: run(x).square().flatten(1).sum(1))


def test_inference_mode_is_refused():
    model, x = network(), torch.randn(4, 3)
    with torch.inference_mode(), pytest.raises(errors.CoverageError, match="inference_mode"):
        dither.clipped_sum(model, lambda: model(x).sum(1))

    def inside():
        with torch.inference_mode():
            return model(x).sum(1)

    with pytest.raises(errors.CoverageError, match="inference_mode"):
        dither.clipped_sum(model, inside)


def test_threads_record_each_for_themselves():
    model, x, found = network(), torch.randn(4, 3), []

    def work():
        own = copy.deepcopy(model)
        found.append(dither.clipped_sum(own, lambda: own(x).square().sum(1)).norms)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and all(torch.equal(norms, found[0]) for norms in found)
    assert torch.autograd.Function.apply.__qualname__.split(".")[0] != "_apply"


def test_a_forward_in_another_thread_is_refused():
    model, x = network(), torch.randn(4, 3)

    def loss_fn():
        out = []
        thread = threading.Thread(target=lambda: out.append(model(x).sum(1)))
        thread.start()
        thread.join()
        return out[0]

    with pytest.raises(errors.CoverageError):
        dither.clipped_sum(model, loss_fn)


def test_generation_between_steps_and_inside_the_loss():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=37, n_positions=16, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    model, ids = transformers.GPT2LMHeadModel(config).train(), torch.randint(1, 37, (3, 5))

    def generated():
        return model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)

    def loss_fn():
        torch.manual_seed(1)
        return model(input_ids=generated()).logits.flatten(1).square().mean(1)

    assert_exact(model, loss_fn)
    generated()
    assert_exact(model, loss_fn)


@pytest.mark.filterwarnings("ignore:Error detected in:UserWarning")
def test_anomaly_detection():
    """The proofs' own NaN are none; the examples' are reported by torch, as its user asked."""
    model, x = network(), torch.randn(4, 3)
    with torch.autograd.set_detect_anomaly(True, check_nan=True):
        assert_exact(model, lambda: model(x).square().sum(1))
        with pytest.raises(errors.CoupledExamplesError):
            dither.clipped_sum(model, lambda: model(model[:1](x).mean(0)[:3] + x).square().sum(1))
        assert torch.is_anomaly_enabled() and torch.is_anomaly_check_nan_enabled()
        with pytest.raises(RuntimeError, match="returned nan values"):
            dither.clipped_sum(model, lambda: (model(x) * 0).sqrt().sum(1) * 0)


# --- custom autograd functions --------------------------------------------------------------------


class Scaled(torch.autograd.Function):
    """Two outputs, an argument that is no tensor between tensors, one that is None."""

    @staticmethod
    def forward(ctx, x, scale, weight, note):
        ctx.save_for_backward(x, weight)
        ctx.scale = scale
        return scale * (x @ weight), weight.sum() * x[:, 0]

    @staticmethod
    def backward(ctx, g, h):
        x, weight = ctx.saved_tensors
        to_x = ctx.scale * g @ weight.T
        to_x[:, 0] += h * weight.sum()
        return to_x, None, ctx.scale * x.T @ g + (h @ x[:, 0]).expand_as(weight), None


applied_elsewhere = Scaled.apply
"""A reference from before any recording, as most code keeps one."""


class ByNumpy(torch.autograd.Function):
    """No batching rule can see into this backward."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x * weight

    @staticmethod
    def backward(ctx, g):
        x, weight = ctx.saved_tensors
        return g * weight, torch.from_numpy((g.numpy() * x.numpy()).sum(0))


@pytest.mark.parametrize("first", [True, False])
def test_custom_functions_of_a_parameter_are_exact(first):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.inner = nn.Parameter(torch.randn(3, 3)), nn.Linear(3, 3)
            self.scale = nn.Parameter(torch.randn(3))

        def forward(self, x):
            y, z = applied_elsewhere(x if first else self.inner(x), 2.0, self.weight, "a note")
            u, v = Scaled.apply(y, -1.0, self.weight.t() * 1.5, None)  # of a tensor computed from the parameter, too
            return ByNumpy.apply(u + self.inner(x), self.scale).square().sum(1) + z * v

    model, x = Model(), torch.randn(4, 3)
    assert_exact(model, lambda: model(x))


def test_a_custom_function_of_parameters_alone_gives_a_computed_parameter():
    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx, a, b, scale):
            ctx.save_for_backward(a, b, scale)
            return scale * a @ b

        @staticmethod
        def backward(ctx, g):
            a, b, scale = ctx.saved_tensors
            return scale * g @ b.T, scale * a.T @ g, None

    model = Function(lambda x, a, b: F.linear(x, Product.apply(a, b, torch.tensor(0.5))), a=(3, 2), b=(2, 4))
    x = torch.randn(4, 5, 4)
    assert_exact(model, lambda: model(x).square().flatten(1).sum(1))


def test_a_custom_function_that_adds_a_gradient_of_its_own_is_refused():
    class AddAuxiliary(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, auxiliary):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            return g, torch.ones(())

    model, x = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)]), torch.randn(4, 3)

    def loss_fn():
        gate = model[1](x).softmax(-1)
        return (AddAuxiliary.apply(model[0](x), gate.mean(0).square().sum()) * gate).square().sum(1)

    with pytest.raises(errors.CoverageError, match="no example's loss"):
        dither.clipped_sum(model, loss_fn)


# --- randomness ------------------------------------------------------------------------------------


def _attend(x, keys, values):
    queries = x.unsqueeze(1)
    return F.scaled_dot_product_attention(queries, keys[None, None], values[None, None], dropout_p=0.5)


def test_randomness_of_operations_without_a_rule():
    model, x = Function(_attend, keys=(6, 4), values=(6, 4)), torch.randn(1, 3, 4).expand(5, 3, 4).contiguous()

    def loss_fn():
        torch.manual_seed(4)
        return model(x).square().flatten(1).sum(1)

    assert_exact(model, loss_fn)
    different = dither.per_example_norms(model, loss_fn)
    assert different.unique().numel() > 1
    same = dither.per_example_gradients(model, loss_fn, randomness="same")
    for gradient in same.values():
        torch.testing.assert_close(gradient, gradient[:1].expand_as(gradient))
    for strategy in STRATEGIES:
        norms = dither.clipped_sum(model, loss_fn, strategy=strategy, randomness="same").norms
        torch.testing.assert_close(norms, oracle.norms(same))
    with pytest.raises(errors.UnsupportedOpError, match="randomness"):
        dither.clipped_sum(model, loss_fn, randomness="error")
    with pytest.raises(errors.ConfigurationError, match="randomness"):
        dither.clipped_sum(model, loss_fn, randomness="none")
