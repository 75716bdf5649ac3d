"""Real measurements at tiny sizes: times in turns, peaks in processes, plans, growth."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from dither.benchmark import measure, worker
from dither.benchmark.explain import explain
from dither.benchmark.models import MicroBatch, Sizes, Workload, squared_error, workload
from dither.benchmark.sweep import AXES, exponent, sweep
from dither.clipping.gradients import Gradients

REQUEST = {"smoke": True, "microbatches": 2, "pairs": 2, "warm_up": 1, "threads": 1}


@pytest.fixture(autouse=True)
def quiet(recwarn):
    """Opacus and torch warn of much that is not dither's."""


def test_times_of_those_that_run_and_errors_of_the_rest():
    cells = measure.times(
        workload("gpt2", smoke=True), ["plain", "auto", "opacus_ghost"], microbatches=2, pairs=3, warm_up=1
    )
    assert cells["opacus_ghost"].error == ("NotImplementedError: Parameter tying is not supported with Ghost Clipping")
    assert not cells["opacus_ghost"].seconds
    for name in ("plain", "auto"):
        assert cells[name].error is None
        assert len(cells[name].seconds) == 3
        assert min(cells[name].seconds) > 0
    assert cells["plain"].distance is None
    assert cells["auto"].distance == 0.0


def test_another_sum_shows():
    ones = {"a": torch.ones(3), "b": torch.ones(2, 2)}
    assert measure.distance(ones, ones) == 0.0
    assert measure.distance({"a": torch.ones(3)}, ones) == pytest.approx((4 / 7) ** 0.5)
    assert measure.distance({"a": torch.ones(3), "b": torch.full((2, 2), math.nan)}, ones) != 0.0


def test_peak_has_a_process_and_counts_what_is_held():
    """A process that holds 300 MiB has a peak of at least that, and the next one knows nothing of it."""
    code = (
        "import torch; from dither.benchmark import measure as m; before = m.resident(); m.forget_peak();"
        "x = torch.ones(75 * 2**20); del x; print(m.high_water() - before)"
    )
    held = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert 300 * 2**20 <= held < 340 * 2**20


def test_peak_of_a_contender():
    found = worker.peak("hold", {**REQUEST, "model": "dit-384"})
    assert found.error is None
    parameters = sum(p.numel() for p in workload("dit-384", smoke=True).build().parameters() if p.requires_grad)
    gradients_and_state = 3 * parameters * 4 / 2**20  # the sums, and AdamW's two averages
    assert found.peak_mib > gradients_and_state
    assert found.first_peak_mib > gradients_and_state


def test_a_worker_that_dies_is_an_error_in_the_cell():
    gone = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    with pytest.raises(worker.WorkerError, match="SIGKILL"):
        worker.ask({"task": "times"}, ["python3", "-c", gone])
    with pytest.raises(worker.WorkerError, match="ZeroDivisionError"):
        worker.ask({"task": "times"}, ["python3", "-c", "1 / 0"])
    cells = worker.times(["plain", "auto"], {**REQUEST, "model": "no such model"})
    assert {cell.error is not None and "no such model" in cell.error for cell in cells.values()} == {True}


@pytest.mark.parametrize("power", [0.0, 1.0, 1.5, 2.0])
def test_exponent_is_recovered(power):
    values = [4, 8, 16, 64]
    assert exponent(values, [0.3 * v**power for v in values]) == pytest.approx(power, abs=1e-12)


def test_exponent_of_noisy_times():
    noise = torch.randn(5, generator=torch.Generator().manual_seed(0)).mul(0.05).exp().tolist()
    values = [2, 4, 8, 16, 32]
    assert exponent(values, [v**1.3 * n for v, n in zip(values, noise, strict=True)]) == pytest.approx(1.3, abs=0.05)


@pytest.mark.parametrize("axis", AXES)
def test_sweep(axis):
    found = sweep(axis, microbatches=1, pairs=2, warm_up=1, smoke=True)
    assert found.axis == axis
    assert [len(taken) for taken in found.seconds["auto"]] == [2] * len(found.values)
    assert set(found.exponents) == {"plain", "auto"}
    assert all(math.isfinite(power) for power in found.exponents.values())
    assert len(found.ratios()) == len(found.values)


def test_explain_measures_every_use():
    before = Gradients.receive
    uses = explain(workload("gpt2", smoke=True), steps=2, warm_up=1)
    assert Gradients.receive is before
    model = workload("gpt2", smoke=True).build()
    assert {use.parameter for use in uses} == {n for n, p in model.named_parameters() if p.requires_grad}
    tied = [use.measured for use in uses if use.parameter == "inner.transformer.wte.weight"]
    assert len(tied) == 2
    assert sorted(tied)[0] == 0.0
    assert sum(use.measured == 0.0 for use in uses) == 1


def test_explain_finds_the_dear_use():
    """A product a thousand times as large as the other takes longer."""
    make = lambda: nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 1024), nn.Linear(1024, 1024))  # noqa: E731
    draw = lambda: MicroBatch((torch.randn(4, 64, 32),), torch.randn(4, 64, 1024))  # noqa: E731
    chosen = Workload("two", Sizes(width=1024, depth=1, tokens=64, batch=4), make, draw, squared_error)
    uses = {use.parameter: use for use in explain(chosen, "hold", steps=3, warm_up=1)}
    assert uses["2.weight"].measured > 5 * uses["0.weight"].measured
    assert uses["2.weight"].held_bytes == 4 * 1024**2 * 4
    assert {use.strategy for use in uses.values()} == {"hold"}


@pytest.mark.skipif("DITHER_JAX_PYTHON" not in os.environ, reason="the Python of an environment with jax-privacy")
def test_jax_does_the_same_work():
    sizes = {"width": 64, "depth": 1, "tokens": 16, "batch": 3}
    command = [os.environ["DITHER_JAX_PYTHON"], str(worker.JAX_SCRIPT)]
    assert worker.ask({**REQUEST, **sizes, "task": "check"}, command)["cells"]["distance"] < 1e-5
    cells, versions = worker.jax(command[0], {**REQUEST, **sizes}, memory=True)
    assert {len(cell.seconds) for cell in cells.values()} == {REQUEST["pairs"]}
    assert min(cell.peak_mib for cell in cells.values()) > 0
    assert json.dumps(versions)
