"""Poisson batches: independent inclusion at the accounted rate, empty ones included; micro-batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import binom
from torch import nn
from torch.utils.data import TensorDataset, default_collate

import dither
from dither.clipping.machine import BUILTIN, Rates
from dither.clipping.plan import Plan, PlannedUse
from dither.errors import BatchSizeError, ConfigurationError, EmptyDatasetError, MemoryBudgetError
from dither.microbatches import MicrobatchSize
from dither.sampling import PoissonSampler, check_dataset, load_batch

CPU = torch.device("cpu")


def test_each_example_enters_independently_at_the_rate():
    sampler, draws = PoissonSampler(50, 10), 13_000
    masks = torch.zeros(draws, 50)
    for i in range(draws):
        masks[i, sampler.draw(i)] = 1
    # How often an example, and a pair of them, came: by the binomial's own tails, whose skew five deviations forget.
    together = (masks.T @ masks).numpy()
    alone, pairs = together.diagonal(), together[np.triu_indices(50, 1)]
    for counts, rate in ((alone, 0.2), (pairs, 0.04)):
        assert min(binom.cdf(counts, draws, rate).min(), binom.sf(counts - 1, draws, rate).min()) > 1e-11
    # A shuffled loader would give every batch the same size; Poisson sizes are binomial.
    sizes = masks.sum(1)
    assert abs(float(sizes.var()) / (50 * 0.2 * 0.8) - 1) < 0.15
    assert torch.corrcoef(torch.stack([sizes[:-1], sizes[1:]]))[0, 1].abs() < 5 / draws**0.5


def test_empty_batches_happen_and_have_no_micro_batches():
    sampler = PoissonSampler(20, 1)
    empty = [batch for batch in (sampler.draw(i) for i in range(200)) if not len(batch)]
    assert len(empty) > 30  # (1 - 1/20)^20 = 0.36
    assert list(MicrobatchSize(4, CPU).split(empty[0])) == []


def test_full_batch_has_everyone():
    assert len(PoissonSampler(7, 7).draw(0)) == 7


@pytest.mark.parametrize("size", [1, 2, "auto"])
def test_micro_batches_cover_the_batch_once_for_any_dataset(size):
    x = torch.arange(400.0).view(200, 2)
    indices = np.flatnonzero(np.arange(200) % 3 == 1)
    for dataset, collate in ((TensorDataset(x), None), ([x[i] for i in range(200)], torch.stack)):
        loaded = [load_batch(dataset, part, collate) for part in MicrobatchSize(size, CPU).split(indices)]
        parts = [p[0] if isinstance(p, list) else p for p in loaded]
        if size != "auto":
            assert all(len(p) <= size for p in parts)
        assert torch.equal(torch.cat(parts), x[indices])


def test_bad_sizes():
    with pytest.raises(EmptyDatasetError):
        check_dataset([])
    with pytest.raises(ConfigurationError, match="map-style"):
        check_dataset(iter([1]))
    for size in (0, 11, -1):
        with pytest.raises(BatchSizeError):
            PoissonSampler(10, size)
    for size in (0, "big", 1.5):
        with pytest.raises(ConfigurationError):
            MicrobatchSize(size, CPU)


def test_seeded_batches_repeat_by_step_and_unseeded_never():
    seeded = PoissonSampler(1000, 100, seed=1)
    assert np.array_equal(seeded.draw(3), PoissonSampler(1000, 100, seed=1).draw(3))
    assert not np.array_equal(seeded.draw(3), seeded.draw(4))
    fresh = PoissonSampler(1000, 100)
    assert not np.array_equal(fresh.draw(3), fresh.draw(3))


def test_auto_grows_only_while_memory_allows(monkeypatch):
    state = {"used": 0.0}
    monkeypatch.setattr("dither.microbatches._memory", lambda device: (0.0, 1000.0))
    monkeypatch.setattr("dither.microbatches._peak", lambda device: state["used"])
    size = MicrobatchSize("auto", CPU)
    for part in size.split(np.arange(500)):
        state["used"] = 20.0 * len(part)
        assert state["used"] <= 500
    assert size.current == 16 and not size._growing  # 32 would take 640 of the 500 allowed
    assert MicrobatchSize("auto", CPU, seeded=True).current == 32


@pytest.mark.parametrize("kept", [False, True])
def test_auto_counts_what_an_allocator_keeps(monkeypatch, kept):
    """Where memory stays with the process, only a size's first micro-batch adds to what it holds."""
    held = {"now": 0.0, "peak": 0.0}

    def memory(device):
        held["peak"] = held["now"]
        return held["now"], 10_000.0 - held["now"]

    monkeypatch.setattr("dither.microbatches._memory", memory)
    monkeypatch.setattr("dither.microbatches._peak", lambda device: held["peak"])
    monkeypatch.setattr("dither.microbatches.time.perf_counter", lambda: 0.0)  # any size is as fast
    size = MicrobatchSize("auto", CPU)
    for part in size.split(np.arange(4000)):
        held["peak"] = max(held["peak"], 30.0 * len(part))
        held["now"] = held["peak"] if kept else 0.0
    # 128 take 3840, and twice that is more than half of 10,000; where it stays, 256 would add 3840, of 6160 free.
    assert size.current == 128 and not size._growing


@pytest.mark.parametrize(
    "per_call, per_example, found", [(1.0, 0.001, 512), (0.0, 1.0, 64), (100.0, 1.0, 512), (3.0, 1.0, 64)]
)
def test_auto_grows_beyond_64_only_while_examples_get_faster(monkeypatch, per_call, per_example, found):
    clock = {"now": 0.0}
    monkeypatch.setattr("dither.microbatches._memory", lambda device: (0.0, 1e12))
    monkeypatch.setattr("dither.microbatches._peak", lambda device: 0.0)
    monkeypatch.setattr("dither.microbatches.time.perf_counter", lambda: clock["now"])
    size, proved = MicrobatchSize("auto", CPU), set()
    for _ in range(3):
        for part in size.split(np.arange(5000)):
            proof = 1.0 if len(part) in proved else 5.0  # a size is slow the first time
            clock["now"] += proof * (per_call + per_example * len(part))
            proved.add(len(part))
    assert size.current == found and not size._growing


def test_auto_compares_predictions_of_the_same_speeds_only(monkeypatch):
    """Small work is planned by built-in speeds; that a machine is slower than these says nothing about a size."""
    monkeypatch.setattr("dither.microbatches._memory", lambda device: (0.0, 1e12))
    monkeypatch.setattr("dither.microbatches._peak", lambda device: 0.0)
    slower, size = Rates(1.0, 1.0, 1.0, 1.0), MicrobatchSize("auto", CPU)
    for part in size.split(np.arange(28)):  # 4, 8, 16
        dearer = 1.0 if len(part) < 16 else 3.0
        use = PlannedUse("weight", "linear", "ghost", 0, dearer * len(part))
        size.planned(Plan((use,), BUILTIN if len(part) < 16 else slower))
    assert size.current == 32
    for part in size.split(np.arange(32)):
        size.planned(Plan((PlannedUse("weight", "linear", "ghost", 0, 4.0 * len(part)),), slower))
    assert size.current == 16 and not size._growing


def test_remainders_have_few_sizes():
    size, seen = MicrobatchSize(64, CPU), set()
    for count in range(1, 400):
        parts = [len(part) for part in size.split(np.arange(count))]
        assert sum(parts) == count and len(parts) <= count // 64 + 2
        seen |= set(parts)
    assert seen == {64, *range(8, 64, 8), *range(1, 8)}
    assert [len(part) for part in MicrobatchSize(5, CPU).split(np.arange(9))] == [5, 4]


@pytest.mark.parametrize("size", [5, 17, 50, 100])
def test_a_number_is_kept(size):
    assert [len(part) for part in MicrobatchSize(size, CPU).split(np.arange(3 * size))] == [size] * 3


def test_auto_goes_back_where_held_gradients_no_longer_fit_the_budget():
    layer, data = nn.Linear(64, 64, bias=False), TensorDataset(torch.randn(400, 128, 64))
    training = dither.PrivateTraining(
        layer,
        torch.optim.SGD(layer.parameters(), lr=0.1),
        data,
        lambda model, batch: model(batch[0]).square().mean((1, 2)),
        expected_batch_size=100,
        steps=2,
        noise_multiplier=1.0,
        memory_budget=4.0 * 64 * 64 * 6,
    )
    for _ in training:
        pass
    assert training.microbatches.current == 4  # of 8, per-example gradients would take more than six of them


@pytest.mark.parametrize("seed", [None, 3])
def test_auto_keeps_to_a_budget_for_gradients_that_have_to_be_formed(seed):
    weight = nn.Parameter(torch.randn(20, 20))
    data, drawn = TensorDataset(torch.randn(60, 5, 20)), []

    def loss_fn(model, batch):
        drawn.append(len(batch[0]))
        return (batch[0] @ (model[0] * 2)).square().mean((1, 2))

    def weights_after(**settings):
        with torch.no_grad():
            weight.copy_(torch.eye(20))
        model = nn.ParameterList([weight])
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        training = dither.PrivateTraining(
            model, optimizer, data, loss_fn, expected_batch_size=60, steps=2, noise_multiplier=1e-9, **settings
        )
        for step in training:
            assert step.batch_size == 60
        return training.microbatches.current, weight.detach().clone()

    held = 4.0 * 20 * 20
    size, found = weights_after(memory_budget=10 * held, seed=seed)
    assert size == 8 and max(drawn) > 10  # a size that the budget refused was tried, and its examples were cut
    size, wanted = weights_after(seed=seed)
    assert torch.allclose(found, wanted, atol=1e-5)
    with pytest.raises(MemoryBudgetError):
        weights_after(memory_budget=0.5 * held, seed=seed)  # not even one example
    with pytest.raises(MemoryBudgetError):
        weights_after(memory_budget=10 * held, microbatch_size=16)


def test_a_tensor_dataset_is_collated_as_torch_does():
    dataset = TensorDataset(torch.randn(9, 2), torch.arange(9))
    indices = np.array([1, 4, 8])
    fast, slow = load_batch(dataset, indices), default_collate([dataset[i] for i in indices])
    assert type(fast) is type(slow) and all(torch.equal(a, b) for a, b in zip(fast, slow, strict=True))
    subset = torch.utils.data.Subset(dataset, [2, 3, 4])
    assert load_batch(subset, np.array([0, 2]))[1].tolist() == [2, 4]
