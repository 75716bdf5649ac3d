"""Models of one input: Opacus's own results, and those of one example at a time. The document's first suite."""

from __future__ import annotations

import opacus
import pytest
import torch
import torch.nn.functional as F
from opacus import GradSampleModule
from opacus.optimizers import DPOptimizer
from opacus.validators import ModuleValidator
from seed_cases import clipped_sum, example_error, median_norm, named, one_at_a_time, replayed, seeded, within
from torch import nn

import dither.opacus
import oracle

pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # of Opacus's own hooks


class Classifier(nn.Module):
    """Token ids (B, T) to logits (B, 5)."""

    def __init__(self):
        super().__init__()
        self.words, self.places = nn.Embedding(50, 16), nn.Embedding(12, 16)
        self.layer = nn.TransformerEncoderLayer(16, nhead=2, dim_feedforward=32, dropout=0.1, batch_first=True)
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 5)

    def forward(self, ids):
        places = torch.arange(ids.shape[1]).expand_as(ids)
        return self.head(self.norm(self.layer(self.words(ids) + self.places(places))).mean(1))


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 10))


def rows(size=8, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, 16, generator=generator), torch.randint(10, (size,), generator=generator)


def losses(model, x, labels):
    return F.cross_entropy(model(x), labels, reduction="none")


def wrapped_gradients(model, x, labels):
    """Through whatever `opacus.GradSampleModule` is now."""
    wrapped = GradSampleModule(model)
    assert type(wrapped) is opacus.GradSampleModule
    assert isinstance(wrapped, dither.opacus.GradSampleModule) == dither.opacus.installed()
    seeded(0)
    F.cross_entropy(wrapped(x), labels).backward()
    found, plain = named(wrapped, "grad_sample"), named(wrapped, "grad")
    wrapped.to_standard_module()
    model.zero_grad()
    return found, plain


def as_before_and_exact(model, x, labels, truth):
    """Ours is the reference and what Opacus gives; `.grad` is the mean over the examples."""
    with dither.opacus.install():
        ours, plain = wrapped_gradients(model, x, labels)
    stock, stock_plain = wrapped_gradients(model, x, labels)
    within("per-example gradients", example_error(ours, truth))
    within("per-example gradients, Opacus's", example_error(ours, stock))
    within("gradient, Opacus's", oracle.relative_error(plain, stock_plain))


def test_simple_mlp():
    model, (x, labels) = mlp(), rows()
    as_before_and_exact(model, x, labels, one_at_a_time(model, losses, x, labels))


def test_transformer_classifier():
    torch.manual_seed(0)
    model = ModuleValidator.fix(Classifier())
    ids, labels = torch.randint(50, (6, 12)), torch.randint(5, (6,))
    as_before_and_exact(model, ids, labels, replayed(model, losses, ids, labels, state=seeded(0)))


def test_output_determinism():
    torch.manual_seed(0)
    model = ModuleValidator.fix(Classifier())
    ids = torch.randint(50, (6, 12))

    def outputs(of):
        for training in (True, False):
            of.train(training)
            torch.manual_seed(3)
            yield of(ids).detach()

    before = list(outputs(model))
    with dither.opacus.install():
        wrapped = GradSampleModule(model)
        for again in (outputs(wrapped), outputs(wrapped)):
            assert [torch.equal(a, b) for a, b in zip(before, again, strict=True)] == [True, True]


def test_gradient_accumulation():
    model = mlp()
    batches = [rows(8, seed=1), rows(5, seed=2)]
    truth = [one_at_a_time(model, losses, *batch) for batch in batches]
    together = {name: torch.cat([t[name] for t in truth]) for name in truth[0]}
    bound = median_norm(together)

    def summed(skip):
        """The clipped sum of both batches: kept as a list, or clipped at once in a skipped step."""
        wrapped = GradSampleModule(model)
        inner = torch.optim.SGD(wrapped.parameters(), lr=0.0)
        options = {"noise_multiplier": 0.0, "max_grad_norm": bound, "expected_batch_size": 8}
        optimizer = DPOptimizer(inner, **options)
        for x, labels in batches:
            F.cross_entropy(wrapped(x), labels).backward()
            if skip and x is batches[0][0]:
                optimizer.signal_skip_step()
                optimizer.step()
                optimizer.zero_grad()
        if not skip:
            samples = {name: p.grad_sample for name, p in wrapped._module.named_parameters()}
            for i, alone in enumerate(truth):
                within(f"batch {i}", example_error({name: s[i] for name, s in samples.items()}, alone))
        optimizer.signal_skip_step(False)
        optimizer.step()
        found = named(wrapped, "summed_grad")
        optimizer.zero_grad()
        wrapped.to_standard_module()
        return found

    for skip in (False, True):
        with dither.opacus.install():
            ours = summed(skip)
        within("clipped sum", oracle.relative_error(ours, clipped_sum(together, bound)))
        within("clipped sum, Opacus's", oracle.relative_error(ours, summed(skip)))


def test_per_sample_gradient_correctness():
    torch.manual_seed(0)
    features = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2))
    model = nn.Sequential(features, nn.Flatten(), nn.LayerNorm(8 * 9), nn.Linear(8 * 9, 10))
    x, labels = torch.randn(7, 3, 8, 8), torch.randint(10, (7,))
    as_before_and_exact(model, x, labels, one_at_a_time(model, losses, x, labels))
