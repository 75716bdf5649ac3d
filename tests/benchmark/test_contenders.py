"""Every contender does the same work: the clipped sum of one example at a time, noise once, the same division."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from dither.benchmark.contenders import CONTENDERS, MAX_GRAD_NORM, OURS, contender
from dither.benchmark.measure import distance
from dither.benchmark.models import Sizes, dit, workload
from dither.errors import ConfigurationError

MICROBATCHES = 2
COMPARED = ("dit-384", "unet", "gpt2")
PRIVATE = [name for name in CONTENDERS if name != "plain"]
NEEDS = {name: name.split("_")[0] for name in PRIVATE if name not in OURS}
TYING = "Parameter tying is not supported with Ghost Clipping"


@pytest.fixture(autouse=True)
def quiet(recwarn):
    """Opacus and torch warn of much that is not dither's."""


def needed(name):
    if name in NEEDS and importlib.util.find_spec(NEEDS[name]) is None:
        pytest.skip(f"{NEEDS[name]} is not installed")


def one_at_a_time(chosen, max_grad_norm=MAX_GRAD_NORM):
    """The clipped sum by plain autograd, and the norms."""
    model, views = chosen.build(), chosen.sizes.views
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    sums, norms = {n: torch.zeros_like(p) for n, p in parameters.items()}, []
    for batch in chosen.batches(MICROBATCHES):
        for i in range(chosen.sizes.batch):
            rows = slice(i * views, (i + 1) * views)
            output = model(*(part[rows] for part in batch.inputs))
            (loss,) = chosen.losses(output, batch.target[rows])
            gradients = torch.autograd.grad(loss, list(parameters.values()))
            norm = torch.stack([g.double().square().sum() for g in gradients]).sum().sqrt()
            norms.append(float(norm))
            for name, gradient in zip(parameters, gradients, strict=True):
                sums[name] += gradient * min(1.0, max_grad_norm / float(norm))
    return sums, norms


@pytest.fixture(scope="module")
def expected():
    """Sums by model, computed once; every example is clipped."""
    found = {}
    for name in COMPARED:
        found[name], norms = one_at_a_time(workload(name, smoke=True))
        assert min(norms) > MAX_GRAD_NORM
    return found


@pytest.mark.parametrize("model", COMPARED)
@pytest.mark.parametrize("name", PRIVATE)
def test_the_same_clipped_sum(name, model, expected):
    needed(name)
    if (name, model) == ("opacus_ghost", "gpt2"):
        with pytest.raises(NotImplementedError, match=TYING):
            contender(name, workload(model, smoke=True), MICROBATCHES).sums()
        return
    found = contender(name, workload(model, smoke=True), MICROBATCHES).sums()
    assert found.keys() == expected[model].keys()
    assert distance(found, expected[model]) < 1e-5


@pytest.mark.parametrize("name", OURS)
def test_an_example_of_several_views(name):
    chosen = dit(Sizes(width=32, depth=1, tokens=16, batch=2, views=3))
    assert len(chosen.batches(1)[0].target) == 6
    sums, _ = one_at_a_time(chosen)
    assert distance(contender(name, chosen, MICROBATCHES).sums(), sums) < 1e-5


@pytest.mark.parametrize("name", PRIVATE)
def test_a_step_divides_and_draws_noise_once(name, expected):
    needed(name)
    chosen = workload("dit-384", smoke=True)
    rows, sums, gradients = MICROBATCHES * chosen.sizes.batch, expected["dit-384"], {}
    for noise in (0.0, 3.0):
        made = contender(name, chosen, MICROBATCHES, noise)
        made.step()
        named = dict(made.model.named_parameters())
        gradients[noise] = {n: named[n if n in named else f"_module.{n}"].grad for n in sums}
    assert distance({n: g * rows for n, g in gradients[0.0].items()}, sums) < 1e-5
    drawn = torch.cat([(gradients[3.0][n] - gradients[0.0][n]).flatten() for n in sums]) * rows
    assert drawn.std().item() == pytest.approx(3.0 * MAX_GRAD_NORM, rel=0.01)  # of 150,000 numbers


def test_plain_accumulates_the_mean():
    chosen = workload("dit-384", smoke=True)
    plain = contender("plain", chosen, MICROBATCHES)
    before = {n: p.detach().clone() for n, p in plain.model.named_parameters() if p.requires_grad}
    plain.step()
    rows = MICROBATCHES * chosen.sizes.batch
    sums, _ = one_at_a_time(chosen, max_grad_norm=float("inf"))
    after = dict(plain.model.named_parameters())
    assert distance({n: after[n].grad * rows for n in before}, sums) < 1e-5
    assert all(not torch.equal(after[n], before[n]) for n in before)


def test_the_same_weights_and_data_each_time():
    first, second = (workload("unet", smoke=True) for _ in range(2))
    assert all(map(torch.equal, first.build().parameters(), second.build().parameters()))
    one, other = first.batches(2), second.batches(2)
    assert all(torch.equal(a.target, b.target) for a, b in zip(one, other, strict=True))
    assert not torch.equal(one[0].target, one[1].target)


def test_what_is_not_known_is_named():
    with pytest.raises(ConfigurationError, match="resnet"):
        workload("resnet")
    with pytest.raises(ConfigurationError, match="ghots"):
        contender("ghots", workload("dit-384", smoke=True), 1)
    with pytest.raises(ConfigurationError, match="tokens=50"):
        workload("dit-384", tokens=50)


@pytest.mark.parametrize("name", ["opacus_hooks", "opake"])
def test_rows_are_not_examples(name):
    needed(name)
    with pytest.raises(ConfigurationError, match="every row"):
        contender(name, dit(Sizes(width=32, depth=1, tokens=16, batch=2, views=3)), 1)
