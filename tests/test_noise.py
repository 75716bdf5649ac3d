"""The noise is Gaussian, independent, fresh, and of the claimed scale."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from scipy import stats

from dither.errors import ConfigurationError
from dither.noise import GaussianNoise, sequence
from dither.normals import _STEP, _VARIANCE, BLOCK, Normals

N = 1_000_000


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_million_draws_are_gaussian_of_the_claimed_scale(dtype):
    tensors = {"a": torch.zeros(N // 2, dtype=dtype), "b": torch.zeros(1000, N // 2000, dtype=dtype)}
    GaussianNoise().add_(tensors, 2.5)
    drawn = torch.cat([t.flatten().double() for t in tensors.values()])
    assert abs(float(drawn.std()) / 2.5 - 1) < 0.005
    assert stats.kstest((drawn / 2.5).numpy(), "norm").pvalue > 1e-4


def test_the_tails_and_the_moments_of_twenty_million_draws():
    normals, tails, moments = Normals(b"sixteen bytes ok"), dict.fromkeys((3.0, 4.0, 5.0), 0), np.zeros(3)
    blocks = 20 * N // BLOCK
    for block in range(blocks):
        drawn = normals.draw(block, BLOCK, 1.0)
        squares = drawn * drawn
        moments += [drawn.sum(), squares.sum(), squares @ squares]
        for bound in tails:
            tails[bound] += np.count_nonzero(squares > bound**2)
    count = blocks * BLOCK
    deviations = (moments / count - [0, 1, 3]) / np.sqrt(np.array([1, 2, 96]) / count)
    assert np.abs(deviations).max() < 5
    for bound, seen in tails.items():
        expected = 2 * count * stats.norm.sf(bound)
        assert abs(seen - expected) < 5 * expected**0.5, bound


@pytest.mark.parametrize("bound", [1.0, 3.0, 4.5, 6.0, 7.0])
def test_the_tails_of_the_transform_are_the_normal_ones(bound):
    """By a lattice of bits in place of random ones, over the radii above the bound: 655,360 pairs."""
    normals, pairs, blocks, beyond = Normals(bytes(16)), BLOCK // 2, 20, 0
    radii_beyond = np.exp(-(bound**2) / 2)
    for block in range(blocks):
        i = np.arange(block * pairs, (block + 1) * pairs)
        u = (i + 0.5) / (blocks * pairs) * radii_beyond
        turn = (i * (5**0.5 - 1) / 2) % 1.0 - 0.5
        integers = (u * 2.0**63).astype(np.int64), (turn * 2.0**32).astype(np.int32)
        normals._bits[: 12 * pairs] = b"".join(array.tobytes() for array in integers)
        beyond += np.count_nonzero(np.abs(normals._transform(pairs)) > bound)
    assert radii_beyond * beyond / (2 * blocks * pairs) == pytest.approx(2 * stats.norm.sf(bound), rel=5e-4)


@pytest.mark.parametrize(("bits", "radius"), [(0, 9.346), (1, 9.346), (2**62, 1.1774), (2**63 - 1, 0.0)])
@pytest.mark.parametrize("wide", [False, True])
def test_the_radius_reaches_nine_standard_deviations(bits, radius, wide):
    """The transform of chosen bits, at an angle of a quarter turn."""
    normals = Normals(bytes(16), 2, wide=wide)
    normals._bits[:12] = bits.to_bytes(8, sys.byteorder) + (2**30).to_bytes(4, sys.byteorder)
    assert normals._transform(1) == pytest.approx([0.0, radius], abs=1e-3)


def test_the_numbers_lie_on_no_grid():
    """A grid of step 1/f shows as a mean of exp(2 pi i f x) that is not near 0: float32's, and the dither's.

    Without the dither too: what little it lets through must not be there.
    """
    normals, dithered, plain, blocks = Normals(b"sixteen bytes ok"), [], [], 40
    for block in range(blocks):
        dithered.append(normals.draw(block, BLOCK, _VARIANCE**0.5).copy())
        plain.append(normals._transform(BLOCK // 2).copy())
    for drawn, steps in ((plain, (2.0**22, 2.0**23, 2.0**24, 2.0**25)), (dithered, (2.0**24, 2.0**39, 1.0 / _STEP))):
        numbers = np.concatenate(drawn)
        for step in steps:
            phase = 2 * np.pi * ((numbers * step) % 1.0)
            assert np.hypot(np.cos(phase).mean(), np.sin(phase).mean()) < 5 / numbers.size**0.5, step


def test_the_dither_is_uniform_and_independent_of_what_it_is_added_to():
    normals = Normals(b"sixteen bytes ok")
    drawn = normals.draw(0, BLOCK, _VARIANCE**0.5).copy()
    plain = normals._transform(BLOCK // 2)
    dither = (drawn - plain) * 2.0**8
    assert stats.kstest(dither, "uniform", args=(-1, 2)).pvalue > 1e-4
    x, y = plain.reshape(2, -1)
    for others in (plain, np.tile(np.arctan2(y, x), 2), np.tile(x * x + y * y, 2), np.roll(dither, BLOCK // 2)):
        assert abs(np.corrcoef(dither, others)[0, 1]) < 5 / BLOCK**0.5


def test_every_cell_of_float32_below_one_is_as_likely_as_the_others():
    """At float32's own grid, and at steps 2^8 times finer."""
    normals, cells = Normals(b"sixteen bytes ok"), np.zeros((2, 256))
    for block in range(50):
        drawn = normals.draw(block, BLOCK, 1.0)
        for row, steps in zip(cells, (2.0**24, 2.0**32), strict=True):
            row += np.bincount(np.floor(drawn * steps).astype(np.int64) & 255, minlength=256)
    assert min(stats.chisquare(row).pvalue for row in cells) > 1e-4


def test_no_correlation_within_a_block_and_across_blocks():
    """Also of squares: both numbers of a pair come from one radius."""
    normals = Normals(b"sixteen bytes ok")
    drawn = np.concatenate([normals.draw(block, BLOCK, 1.0).reshape(2, -1).copy() for block in range(3)])
    for values in (drawn, drawn**2):
        assert np.abs(np.corrcoef(values) - np.eye(6)).max() < 5 / (BLOCK // 2) ** 0.5
        for lag in (1, 2, 3):
            assert abs(np.corrcoef(values[:, lag:].ravel(), values[:, :-lag].ravel())[0, 1]) < 5 / drawn.size**0.5


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


def test_one_stream_runs_through_tensors_of_any_size():
    """Cut into tensors, some larger than a block and some empty, the noise is that of one tensor."""
    sizes = [3, 0, BLOCK + 1, 1, 70, 3 * BLOCK - 75, 1000]
    whole, parts = torch.zeros(sum(sizes)), [torch.zeros(size) for size in sizes]
    GaussianNoise(5).add_([whole], 1.0)
    GaussianNoise(5).add_(parts, 1.0)
    assert torch.equal(whole, torch.cat(parts))
    assert len(whole.unique()) > 0.98 * len(whole)  # no block's noise is another's


def test_noise_is_added_in_float64_and_rounded_once():
    base = torch.full((1000,), 3.0e7)
    noisy, alone = base.clone(), torch.zeros(1000, dtype=torch.float64)
    GaussianNoise(2).add_([noisy], 1.0)
    key = sequence(2, 0, 1).spawn(1)[0].generate_state(4).tobytes()
    alone += torch.from_numpy(Normals(key).draw(0, 1000, 1.0))
    assert torch.equal(noisy, (base.double() + alone).float())


def test_the_divisor_is_applied_before_the_one_rounding():
    base = torch.randn(1000)
    noisy, alone = base.clone(), torch.zeros(1000, dtype=torch.float64)
    GaussianNoise(2).add_([noisy], 0.5, divisor=3.0)
    key = sequence(2, 0, 1).spawn(1)[0].generate_state(4).tobytes()
    alone += torch.from_numpy(Normals(key).draw(0, 1000, 0.5))
    assert torch.equal(noisy, ((base.double() + alone) * (1.0 / 3.0)).float())
    GaussianNoise().add_([base.double(), silent := base.clone()], 0.0, divisor=4.0)
    assert torch.equal(silent, base / 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_keeps_the_scale(dtype):
    tensor, strided = torch.zeros(100_000, dtype=dtype), torch.zeros(100_000, 3, dtype=dtype)
    GaussianNoise().add_([tensor, strided[:, 1]], 3.0)
    assert abs(float(tensor.double().std()) / 3 - 1) < 0.02
    assert abs(float(strided[:, 1].double().std()) / 3 - 1) < 0.02
    assert not strided[:, ::2].any()


def test_bad_scales_and_tensors():
    for scale in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigurationError, match="standard_deviation"):
            GaussianNoise().add_([torch.zeros(2)], scale)
    for divisor in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigurationError, match="divisor"):
            GaussianNoise().add_([torch.zeros(2)], 1.0, divisor=divisor)
    with pytest.raises(ConfigurationError, match="int64"):
        GaussianNoise().add_([torch.zeros(2, dtype=torch.int64)], 1.0)
