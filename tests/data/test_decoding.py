"""One image file to pixels: colour spaces, depths, transparency, orientation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from dither.data.decoding import UnreadableImageError, decode
from pictures import ramp

RED = (200, 30, 10)


def saved(image, tmp_path, name="a.png", **settings):
    image.save(tmp_path / name, **settings)
    return decode(tmp_path / name)


def test_rgb_and_grey(tmp_path):
    assert saved(Image.new("RGB", (4, 2), RED), tmp_path)[:, 0, 0].tolist() == list(RED)
    grey = saved(Image.new("L", (4, 2), 77), tmp_path)
    assert grey.shape == (1, 2, 4) and grey.dtype == torch.uint8 and grey.unique().tolist() == [77]
    assert saved(Image.new("1", (4, 2), 1), tmp_path).unique().tolist() == [255]


def test_transparency_lies_on_white(tmp_path):
    hidden = Image.new("RGBA", (2, 2), (*RED, 0))
    assert saved(hidden, tmp_path)[:, 0, 0].tolist() == [255] * 3
    assert saved(Image.new("RGBA", (2, 2), (*RED, 255)), tmp_path)[:, 0, 0].tolist() == list(RED)
    half = saved(Image.new("LA", (2, 2), (0, 128)), tmp_path)
    assert half.shape == (1, 2, 2) and half[0, 0, 0] == 127


def test_palette(tmp_path):
    image = Image.new("P", (2, 2), 1)
    image.putpalette([0, 0, 0, *RED])
    assert saved(image, tmp_path)[:, 0, 0].tolist() == list(RED)
    assert saved(image, tmp_path, transparency=1)[:, 0, 0].tolist() == [255] * 3


def test_sixteen_bits(tmp_path):
    values = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    for name in ("a.png", "a.tif"):
        pixels = saved(Image.fromarray(values), tmp_path, name)
        assert pixels.tolist() == [[[0, 1, 128, 255]]]


def test_values_without_a_range_are_refused(tmp_path):
    for kind in (np.float32, np.int32):
        with pytest.raises(UnreadableImageError, match="no fixed range"):
            saved(Image.fromarray(np.ones((2, 2), kind)), tmp_path, "a.tif")


def test_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn a quarter clockwise
    pixels = saved(ramp(0, (6, 3)), tmp_path, exif=exif)
    assert pixels.shape == (3, 6, 3)
    assert pixels[0, 0, 0] == 0 and pixels[0, -1, 0] == 255


def test_cmyk_jpeg(tmp_path):
    pixels = saved(Image.new("CMYK", (8, 8), (0, 0, 0, 0)), tmp_path, "a.jpg")
    assert pixels.shape == (3, 8, 8) and pixels.min() > 250


def test_bytes(tmp_path):
    ramp(0).save(tmp_path / "a.png")
    assert torch.equal(decode((tmp_path / "a.png").read_bytes()), decode(tmp_path / "a.png"))


def test_truncated_and_bombs(tmp_path, monkeypatch):
    ramp(0, (64, 64)).save(tmp_path / "a.jpg")
    whole = (tmp_path / "a.jpg").read_bytes()
    with pytest.raises(UnreadableImageError, match=r"(?i)truncated"):
        decode(whole[: len(whole) // 2])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(UnreadableImageError, match="bomb"):
        decode(whole)
