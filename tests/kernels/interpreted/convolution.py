"""Tile norms of convolutions against autograd in float64."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from dither import kernels
from kernels.interpreted.small import DTYPES, assert_norms, small_tiles, strided

assert small_tiles
FUNCTIONS = {1: F.conv1d, 2: F.conv2d}


def weight_gradients(x, g, shape, **options):
    """Of each example's maps (B, K, ...), by autograd."""
    found = []
    for maps, grad in zip(x, g, strict=True):
        weight = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
        found.append(torch.autograd.grad(FUNCTIONS[x.dim() - 3](maps, weight, **options), weight, grad)[0])
    return torch.stack(found)


@st.composite
def cases(draw):
    dims = draw(st.integers(1, 2))

    def each(low, high):
        return tuple(draw(st.integers(low, high)) for _ in range(dims))

    taps, dilation, groups = each(1, 3), each(1, 2), draw(st.sampled_from([1, 1, 2, 3]))
    padding = each(0, 2)
    least = [max(1, d * (k - 1) + 1 - 2 * p) for d, k, p in zip(dilation, taps, padding, strict=True)]
    space = [draw(st.integers(low, low + 6)) for low in least]
    channels = [groups * draw(st.integers(1, 7)) for _ in range(2)]
    options = {"stride": each(1, 3), "padding": padding, "dilation": dilation, "groups": groups}
    return draw(st.integers(1, 3)), draw(st.integers(1, 2)), channels, space, taps, options


@settings(max_examples=25, deadline=None, derandomize=True)
@given(cases(), st.sampled_from(DTYPES), st.integers(0, 2), st.integers(0, 2))
def test_any_options_and_strides(case, dtype, x_layout, g_layout):
    torch.manual_seed(0)
    batch, maps, (inner, outer), space, taps, options = case
    shape = (outer, inner // options["groups"], *taps)
    x = strided((batch, maps, inner, *space), x_layout, dtype)
    places = FUNCTIONS[len(taps)](x[0].double(), torch.zeros(shape, dtype=torch.float64), **options).shape[2:]
    g = strided((batch, maps, outer, *places), g_layout, dtype)
    found = kernels.convolution_tile_norm(
        x, g, taps, options["stride"], options["padding"], options["dilation"], options["groups"]
    )
    truth = weight_gradients(x.double(), g.double(), shape, **options)
    assert_norms(found, truth, weight_gradients(x.double().abs(), g.double().abs(), shape, **options))


def test_what_is_not_finite_stays_in_its_example():
    torch.manual_seed(0)
    x, g = torch.randn(3, 1, 4, 6, 6), torch.randn(3, 1, 5, 6, 6)
    options = ((3, 3), (1, 1), (1, 1), (1, 1), 1)
    clean = kernels.convolution_tile_norm(x, g, *options)
    x[1, 0, 0, 0, 0] = float("nan")
    found = kernels.convolution_tile_norm(x, g, *options)
    assert found[1].isnan()
    assert torch.equal(found[[0, 2]], clean[[0, 2]])


def test_an_example_beyond_32_bits_is_declined():
    x = torch.empty_strided((2, 1, 4, 6, 6), (36, 36, 2**28, 6, 1), device="meta")
    g = torch.empty(2, 1, 5, 4, 4, device="meta")
    assert kernels.convolution_tile_norm(x, g, (3, 3), (1, 1), (0, 0), (1, 1), 1) is None
