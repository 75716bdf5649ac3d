"""A DiT in `GradSampleModule`: images, timesteps and labels in. The document's second suite."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from opacus import GradSampleModule
from seed_cases import (
    dit,
    dit_batch,
    dit_losses,
    example_error,
    named,
    one_at_a_time,
    parameter_error,
    within,
)

import dither.opacus
import oracle

pytestmark = pytest.mark.usefixtures("installed")


def gradients(wrapped, images, timesteps, labels, target):
    """Per-example gradients of the mean squared error."""
    wrapped.zero_grad()
    F.mse_loss(wrapped(images, timesteps, labels), target).backward()
    return named(wrapped, "grad_sample")


def test_forward_pass():
    model = dit().double()
    images, timesteps, labels, _ = dit_batch(5)
    wrapped = GradSampleModule(dit())
    output = wrapped(images, timesteps, labels).detach()
    alone = [model(images[i : i + 1].double(), timesteps[i : i + 1], labels[i : i + 1]) for i in range(5)]
    assert output.shape == images.shape
    within("output", example_error({"output": output}, {"output": torch.cat(alone).detach()}))


def test_gradsamplemodule_wrapping():
    model = dit()
    names = dict(model.named_parameters()).keys()
    batch = dit_batch(5)
    truth = one_at_a_time(model, dit_losses, *batch)
    wrapped = GradSampleModule(model)
    assert isinstance(wrapped, dither.opacus.GradSampleModule)
    ours = gradients(wrapped, *batch)
    assert ours.keys() == names == truth.keys()
    within("per-example gradients", example_error(ours, truth))
    within("position table", example_error({"": ours["pos_embed"]}, {"": truth["pos_embed"]}))
    mean = {name: g.mean(0) for name, g in truth.items()}
    within("gradient", oracle.relative_error(named(wrapped, "grad"), mean))


def test_conditioning_effect():
    """Another timestep or label moves that example's output and gradient, and nothing of the others."""
    model, (images, timesteps, labels, target) = dit(), dit_batch(4)
    wrapped = GradSampleModule(dit())
    before = wrapped(images, timesteps, labels).detach()
    first = gradients(wrapped, images, timesteps, labels, target)
    later, relabelled = timesteps.clone(), labels.clone()
    later[1] = (later[1] + 500) % 1000
    relabelled[1] = (relabelled[1] + 1) % 7
    for t, y in ((later, labels), (timesteps, relabelled)):
        moved = wrapped(images, t, y).detach() - before
        assert moved[1].norm() > 1e-3 * before[1].norm()
        assert not moved[[0, 2, 3]].any()
        ours = gradients(wrapped, images, t, y, target)
        within("per-example gradients", example_error(ours, one_at_a_time(model, dit_losses, images, t, y, target)))
        change = {name: g[1] - first[name][1] for name, g in ours.items()}
        assert oracle.relative_error(change, {name: g[1] for name, g in first.items()}) > 0.5
        others = [{name: g[[0, 2, 3]] for name, g in of.items()} for of in (ours, first)]
        within("the others", example_error(*others))


def test_per_sample_gradient_correctness():
    """Also for one example, and for as many examples as tokens."""
    model = dit()
    for size in (1, 4, 16):
        batch = dit_batch(size)
        truth = one_at_a_time(model, dit_losses, *batch)
        ours = gradients(GradSampleModule(dit()), *batch)
        within(f"{size} examples", example_error(ours, truth))
        within(f"{size} examples, worst parameter", parameter_error(ours, truth))


def test_output_determinism():
    model, batch = dit(class_dropout_prob=0.5), dit_batch(6)

    def run(of):
        torch.manual_seed(5)
        return of(*batch[:3]).detach()

    plain = run(model)
    wrapped = GradSampleModule(model)
    for again in (run(wrapped), run(wrapped)):
        within("output", oracle.relative_error({"": again}, {"": plain}))
        assert torch.equal(again, plain)
    torch.manual_seed(5)
    first = gradients(wrapped, *batch)
    torch.manual_seed(5)
    second = gradients(wrapped, *batch)
    assert all(torch.equal(first[name], second[name]) for name in first)
