"""The noise is Gaussian, independent, fresh, and of the claimed scale."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from dither.errors import ConfigurationError
from dither.noise import GaussianNoise, sequence

N = 1_000_000


def test_a_million_draws_are_gaussian_of_the_claimed_scale():
    tensors = {"a": torch.zeros(N // 2, dtype=torch.float64), "b": torch.zeros(1000, N // 2000)}
    GaussianNoise().add_(tensors, 2.5)
    drawn = torch.cat([t.flatten().double() for t in tensors.values()])
    assert abs(float(drawn.std()) / 2.5 - 1) < 0.005
    assert stats.kstest((drawn / 2.5).numpy(), "norm").pvalue > 1e-4


def test_no_correlation_across_steps_parameters_and_streams():
    noise = GaussianNoise()
    drawn = []
    for stream, step in ((noise, 0), (noise, 0), (noise, 1), (GaussianNoise(), 0)):
        tensors = {"a": torch.zeros(N // 10), "b": torch.zeros(N // 10)}
        stream.add_(tensors, 1.0, step=step)
        drawn += list(tensors.values())
    correlations = torch.corrcoef(torch.stack(drawn)) - torch.eye(len(drawn))
    assert correlations.abs().max() < 5 / (N // 10) ** 0.5


def test_a_seed_repeats_by_step_and_is_not_private():
    def draw(step):
        tensors = {"a": torch.zeros(100)}
        noise = GaussianNoise(seed=3)
        assert not noise.private
        noise.add_(tensors, 1.0, step=step)
        return tensors["a"]

    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))
    assert GaussianNoise().private
    with pytest.raises(ConfigurationError):
        GaussianNoise(seed=-1)


def test_seeds_keep_more_than_32_bits():
    """torch.Generator on a CPU keeps 32: seeds 1 and 1 + 2**32 give the same numbers there."""
    first, second = torch.zeros(8), torch.zeros(8)
    GaussianNoise(1).add_([first], 1.0)
    GaussianNoise(1 + 2**32).add_([second], 1.0)
    assert not torch.equal(first, second)


def test_noise_does_not_depend_on_the_number_of_threads_nor_on_layout():
    def draw(tensor, threads=1):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            GaussianNoise(5).add_({"a": tensor}, 1.0)
        finally:
            torch.set_num_threads(before)
        return tensor

    assert torch.equal(draw(torch.zeros(300, 1000)), draw(torch.zeros(300, 1000), threads=2))
    assert torch.equal(draw(torch.zeros(1000, 300).T), draw(torch.zeros(300, 1000)))


def test_noise_is_added_in_float64_and_rounded_once():
    base = torch.full((1000,), 3.0e7)
    noisy, alone = base.clone(), torch.zeros(1000, dtype=torch.float64)
    GaussianNoise(2).add_([noisy], 1.0)
    generator = np.random.Generator(np.random.SFC64(sequence(2, 0, 1).spawn(1)[0].spawn(1)[0]))
    alone += torch.from_numpy(generator.standard_normal(1000))
    assert torch.equal(noisy, (base.double() + alone).float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_keeps_the_scale(dtype):
    tensor = torch.zeros(100_000, dtype=dtype)
    GaussianNoise().add_([tensor], 3.0)
    assert abs(float(tensor.double().std()) / 3 - 1) < 0.02


def test_bad_scales_and_tensors():
    for scale in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigurationError, match="standard_deviation"):
            GaussianNoise().add_([torch.zeros(2)], scale)
    with pytest.raises(ConfigurationError, match="int64"):
        GaussianNoise().add_([torch.zeros(2, dtype=torch.int64)], 1.0)
