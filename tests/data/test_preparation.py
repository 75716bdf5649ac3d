"""Size and channels, each image by itself."""

from __future__ import annotations

import pytest
import torch

from dither.data.preparation import Preparation, normalised, to_channels
from dither.errors import ConfigurationError, DataError

RED, GREEN, BLUE = torch.eye(3).view(3, 3, 1, 1)


def test_normalised_by_constants():
    assert normalised(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1, 1]
    assert normalised(torch.tensor([0.25], dtype=torch.float64)).tolist() == [0.25]


def test_luma():
    bytes_ = (torch.stack([RED, GREEN, BLUE]) * 255).to(torch.uint8)
    assert to_channels(bytes_, 1).flatten().tolist() == [76, 150, 29]
    grey = torch.full((1, 2, 2), 9, dtype=torch.uint8)
    assert to_channels(grey, 3).unique().tolist() == [9] and to_channels(to_channels(grey, 3), 1).unique().tolist() == [
        9
    ]


@pytest.mark.parametrize("resize", ["bicubic", "bilinear", "nearest"])
@pytest.mark.parametrize("kind", [torch.uint8, torch.float32])
def test_a_constant_image_stays_one(resize, kind):
    image = torch.full((1, 9, 7), 1, dtype=kind)
    resized = Preparation(4, resize=resize)(image)
    assert resized.shape == (1, 4, 4) and resized.dtype == kind
    assert torch.allclose(resized.float(), torch.ones(()))


def test_crop_cuts_the_centre_and_without_it_all_is_kept():
    image = torch.full((1, 2, 6), -1.0)
    image[..., 2:4] = 1
    assert torch.equal(Preparation(2)(image), torch.ones(1, 2, 2))
    assert torch.equal(Preparation(2, crop=False, resize="nearest")(image), -torch.ones(1, 2, 2))


def test_none_only_cuts():
    image = torch.arange(16, dtype=torch.uint8).view(1, 4, 4)
    assert Preparation(2, resize="none")(image).flatten().tolist() == [5, 6, 9, 10]
    with pytest.raises(DataError, match="too few"):
        Preparation(5, resize="none")(image)


def test_bicubic_stays_in_range():
    image = torch.where(torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0)) < 0.5, -1.0, 1.0)
    assert Preparation(31)(image).abs().max() <= 1


@pytest.mark.parametrize("settings", [{"image_size": 0}, {"channels": 2}, {"resize": "lanczos"}])
def test_wrong_settings_are_refused(settings):
    with pytest.raises(ConfigurationError, match=next(iter(settings))):
        Preparation(**settings)
