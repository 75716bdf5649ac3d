"""`dither.compile`: segments are compiled, operations on parameters are seen, and every strategy is exact.

Most tests compile with aot_eager, which has inductor's graphs, forward and backward, without a C++ compiler's seconds.
"""

from __future__ import annotations

import copy
import pickle
import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import dither
from clipping.test_exactness import assert_exact
from dither import errors
from dither.capture import tracing, watching
from dither.diffusion.dit import DiTBlock

pytestmark = [
    pytest.mark.usefixtures("double_precision"),
    pytest.mark.skipif(not tracing.ISOLATES, reason="this torch runs modules as they are written"),
]


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    tracing._tracers.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error", tracing.AsWrittenWarning)
        yield


@pytest.fixture
def compiled_runs(monkeypatch):
    """How many compiled segments ran."""
    runs = []
    missed = dither.capture.recorder.Recorder.missed
    monkeypatch.setattr(
        dither.capture.recorder.Recorder, "missed", lambda self, *args: (runs.append(args), missed(self, *args))
    )
    return runs


class RootMeanSquare(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width))

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6))


class LlamaBlock(nn.Module):
    """Rotary positions from a buffer, root-mean-square norms, gated perceptron."""

    def __init__(self, width=8, heads=2, tokens=5):
        super().__init__()
        self.heads = heads
        self.before, self.after = RootMeanSquare(width), RootMeanSquare(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.gate, self.up = nn.Linear(width, 12, bias=False), nn.Linear(width, 12, bias=False)
        self.down = nn.Linear(12, width, bias=False)
        angles = torch.arange(tokens).unsqueeze(1) / torch.arange(1, width // heads + 1)
        self.register_buffer("cosines", angles.cos())
        self.register_buffer("sines", angles.sin())

    def rotated(self, x):
        left, right = x.chunk(2, -1)
        return x * self.cosines + torch.cat((-right, left), -1) * self.sines

    def forward(self, x):
        batch, tokens, width = x.shape
        h = self.before(x)
        q, k, v = (
            layer(h).view(batch, tokens, self.heads, -1).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(self.rotated(q), self.rotated(k), v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, tokens, width))
        h = self.after(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Perceptron(nn.Module):
    """Two arithmetic steps and a dropout between linear maps."""

    def __init__(self, width=6, p=0.3):
        super().__init__()
        self.inner, self.outer, self.p = nn.Linear(width, 10), nn.Linear(10, width), p

    def forward(self, x):
        h = F.gelu(self.inner(x)) * 2 + 1
        h = F.dropout(h, self.p, self.training)
        return x + torch.tanh(self.outer(h) * 0.5)


class Modulated(nn.Module):
    """A DiT block between an embedding and a head."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Linear(3, 8), nn.Linear(8, 2)
        self.block = DiTBlock(8, 2, 2.0)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3)

    def forward(self, x):
        return self.head(self.block(self.embed(x), self.embed(x.mean(1))))


class Wrapped(nn.Module):
    def __init__(self, block, width):
        super().__init__()
        self.embed, self.block, self.head = nn.Linear(3, width), block, nn.Linear(width, 2)

    def forward(self, x):
        return self.head(self.block(self.embed(x)))


MODELS = {
    "DiT": lambda: Modulated(),
    "Llama": lambda: Wrapped(LlamaBlock(), 8),
    "perceptron with dropout": lambda: Wrapped(Perceptron(), 6),
}


def losses_of(model, x):
    torch.manual_seed(3)  # the same dropout each time
    return model(x).square().flatten(1).sum(1)


@pytest.mark.parametrize("name", MODELS)
def test_every_strategy_is_exact_at_every_batch_size(name, compiled_runs):
    model = MODELS[name]()
    keys = list(model.state_dict())
    assert dither.compile(model.block, backend="aot_eager") is model.block
    assert list(model.state_dict()) == keys
    for batch in (3, 4, 1, 2):
        x = torch.randn(batch, 5, 3)
        if "dropout" in name and batch > 1:  # the oracle's masks are other ones: compare with what is not compiled
            plain = copy.deepcopy(model)
            expected = dither.per_example_gradients(plain, lambda x=x, plain=plain: losses_of(plain, x))
            found = dither.per_example_gradients(model, lambda x=x: losses_of(model, x))
            assert all(torch.allclose(found[key], expected[key], rtol=1e-12, atol=1e-14) for key in expected)
        else:
            assert_exact(model, lambda x=x: losses_of(model, x))
    assert compiled_runs


def test_inductor_is_exact_in_its_second_pass_too(compiled_runs):
    model = Wrapped(Perceptron(p=0.0), 6)
    dither.compile(model.block)
    x = torch.randn(3, 5, 3)
    assert_exact(model, lambda: losses_of(model, x))
    assert compiled_runs


def test_coupled_examples_in_a_compiled_segment_are_refused(compiled_runs):
    class Coupled(nn.Linear):
        def forward(self, x):
            h = super().forward(x)
            return (h - h.mean(0)) * 2

    model = nn.Sequential(nn.Linear(3, 4), Coupled(4, 4), nn.Linear(4, 2))
    dither.compile(model[1], backend="aot_eager")
    with pytest.raises(errors.CoupledExamplesError):
        dither.clipped_sum(model, lambda: losses_of(model, torch.randn(4, 3)))
    assert compiled_runs


def test_batch_statistics_are_refused_as_without():
    class Normalised(nn.Module):
        def forward(self, x):
            return F.batch_norm(x * 2 + 1, None, None, training=True)

    model = nn.Sequential(nn.Linear(3, 4), nn.Sequential(Normalised(), nn.Linear(4, 4)))
    dither.compile(model[1], backend="aot_eager")
    with pytest.raises(errors.CoupledExamplesError, match="batch normalisation"):
        dither.clipped_sum(model, lambda: losses_of(model, torch.randn(4, 3)))


def test_a_tensor_computed_from_parameters_is_seen_where_it_enters_a_segment(compiled_runs):
    class Scaled(nn.Module):
        def forward(self, x, scale):
            return torch.tanh(x * scale) + x

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.block, self.scale = nn.Linear(3, 4), Scaled(), nn.Parameter(torch.randn(4))

        def forward(self, x):
            return self.block(self.embed(x), self.scale.exp())

    model = Model()
    dither.compile(model.block, backend="aot_eager")
    x = torch.randn(3, 3)
    assert_exact(model, lambda: losses_of(model, x))
    assert not compiled_runs


def test_constants_through_a_segment_stay_constants(compiled_runs):
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3)
            self.register_buffer("table", torch.randn(4, 3))

        def forward(self, x):
            positions = torch.sin(self.table * 2) + 1
            return self.layer(positions) + torch.tanh(x * 2 + 1)

    model = nn.Sequential(nn.Linear(3, 3), Positions())
    dither.compile(model[1], backend="aot_eager")
    x = torch.randn(4, 4, 3)
    assert_exact(model, lambda: losses_of(model, x))


@pytest.mark.parametrize("what", ["in place", "graph break", "checkpoint", "no segment"])
def test_what_cannot_be_cut_runs_as_written(what):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            if what == "no segment":
                return torch.tanh(self.layer(x))
            h = torch.tanh(self.layer(x)) * 2 + 1
            if what == "in place":
                h = h.mul(3)
                h += 1
            if what == "graph break":
                torch._dynamo.graph_break()
            if what == "checkpoint":
                h = checkpoint(self.layer, h, use_reentrant=False)
            return h

    model = nn.Sequential(nn.Linear(3, 4), Block(), nn.Linear(4, 2))
    dither.compile(model[1], backend="aot_eager")
    x = torch.randn(3, 3)
    with pytest.warns(tracing.AsWrittenWarning, match="Block runs as it is written"):
        dither.clipped_sum(model, lambda: losses_of(model, x))
    assert_exact(model, lambda: losses_of(model, x))


def test_a_compiled_block_inside_a_checkpoint_is_exact():
    model = Wrapped(Perceptron(p=0.0), 6)
    dither.compile(model.block, backend="aot_eager")
    x = torch.randn(3, 5, 3)
    assert_exact(model, lambda: model.head(checkpoint(model.block, model.embed(x), use_reentrant=False)).sum((1, 2)))


def test_an_output_changed_in_place_after_its_use_is_noticed():
    model = Wrapped(Perceptron(p=0.0), 6)
    dither.compile(model.block, backend="aot_eager")

    def losses():
        h = model.block(model.embed(torch.randn(3, 5, 3)))
        out = model.head(h)
        h.mul_(2)
        return out.square().sum((1, 2))

    with pytest.raises((errors.SavedInputChangedError, RuntimeError), match=r"in ?place"):
        dither.clipped_sum(model, losses)


def test_more_variants_than_the_limit_run_as_written(monkeypatch):
    monkeypatch.setattr(tracing, "_LIMIT", 1)
    model = Wrapped(Perceptron(p=0.0), 6)
    dither.compile(model.block, backend="aot_eager", dynamic=False)
    first, second = torch.randn(3, 5, 3), torch.randn(4, 5, 3)
    assert_exact(model, lambda: losses_of(model, first))
    with pytest.warns(tracing.AsWrittenWarning, match="Perceptron runs as it is written"):
        dither.clipped_sum(model, lambda: losses_of(model, second))
    assert_exact(model, lambda: losses_of(model, second))


def test_a_view_that_a_segment_returns_may_be_changed_in_place():
    class Turned(nn.Linear):
        def forward(self, x):
            return (torch.tanh(super().forward(x)) * 2 + 1).transpose(1, 2)

    model = nn.Sequential(nn.Linear(3, 4), Turned(4, 4))
    dither.compile(model[1], backend="aot_eager")
    x = torch.randn(3, 5, 3)
    assert_exact(model, lambda: model(x).add_(1).square().sum((1, 2)))


def test_an_error_of_the_module_is_its_own():
    class Picky(nn.Linear):
        def forward(self, x):
            if x.shape[0] > 2:
                raise ValueError("too many examples")
            return torch.tanh(super().forward(x) * 2) + 1

    model = nn.Sequential(nn.Linear(3, 4), Picky(4, 4))
    dither.compile(model[1], backend="aot_eager")
    with pytest.raises(ValueError, match="too many"), pytest.warns(tracing.AsWrittenWarning):
        dither.clipped_sum(model, lambda: losses_of(model, torch.randn(3, 3)))


def test_copies_and_pickles_are_not_compiled_and_training_without_privacy_is():
    model = Wrapped(Perceptron(p=0.0), 6)
    dither.compile(model.block, backend="aot_eager")
    x = torch.randn(3, 5, 3)
    out = model(x)
    out.sum().backward()
    assert model.block.inner.weight.grad is not None
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.block._compiled_call_impl is None
        assert torch.allclose(other(x), out)
    with torch.no_grad():
        assert torch.allclose(model(x), out)
    with pytest.raises(errors.ConfigurationError, match="Module"):
        dither.compile(lambda x: x)


def test_threads_record_compiled_blocks_each_for_themselves():
    models, x, found = [Wrapped(Perceptron(p=0.0), 6) for _ in range(3)], torch.randn(3, 5, 3), []
    for model in models:
        model.load_state_dict(models[0].state_dict())
        dither.compile(model.block, backend="aot_eager")

    def work(model):
        found.append(dither.clipped_sum(model, lambda: model(x).square().sum((1, 2))).norms)

    threads = [threading.Thread(target=work, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3 and all(torch.equal(norms, found[0]) for norms in found)
    assert torch._dynamo.eval_frame._stance.stance == "default"


def test_recordings_that_overlap_leave_compiled_code_compiled():
    first, second = watching.as_written(), watching.as_written()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert torch._dynamo.eval_frame._stance.stance == "force_eager"
    second.__exit__(None, None, None)
    assert torch._dynamo.eval_frame._stance.stance == "default"


def test_private_training_over_poisson_batches(compiled_runs):
    torch.manual_seed(0)
    model = Wrapped(Perceptron(p=0.0), 6)
    plain = copy.deepcopy(model)
    dither.compile(model.block, backend="aot_eager")
    data = [(torch.randn(5, 3),) for _ in range(40)]
    for one in (model, plain):
        training = dither.PrivateTraining(
            one,
            torch.optim.SGD(one.parameters(), lr=0.1),
            data,
            lambda m, batch: m(batch[0]).square().sum((1, 2)),
            expected_batch_size=6,
            steps=6,
            noise_multiplier=1.0,
            microbatch_size=4,
            seed=7,
        )
        sizes = [step.batch_size for step in training]
    assert len(set(sizes)) > 2 and compiled_runs
    assert all(torch.allclose(a, b, rtol=1e-9) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
