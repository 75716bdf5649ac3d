"""Sampled images on disk: what is read back is what was drawn, to the rounding of 8 bits."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from dither.data import read_images
from dither.diffusion.export import save_arrays, save_folder, to_pixels
from dither.diffusion.grid import first_of_each
from dither.errors import ConfigurationError, OutputPathError

IMAGES = torch.linspace(-1, 1, 12 * 3 * 4 * 4).view(12, 3, 4, 4)
LABELS = torch.tensor([10, 2, 2, 0, 10, 10, 0, 2, 2, 2, 0, 1])


def test_pixels_cover_the_range():
    values = torch.tensor([-2.0, -1.0, 0.0, 1.0, 5.0, float("nan")])
    assert to_pixels(values).tolist() == [0, 0, 128, 255, 255, 0]


@pytest.mark.parametrize("channels", [1, 3])
def test_folder_comes_back(channels, tmp_path):
    images = IMAGES[:, :channels]
    assert save_folder(images, LABELS, tmp_path / "out") == 12
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["00", "01", "02", "10"]
    read = read_images(tmp_path / "out", class_names=["00", "01", "02", "10"])
    order = LABELS.sort(stable=True).indices
    torch.testing.assert_close(read.batch()[0], images[order], atol=1 / 255 + 1e-6, rtol=0)
    assert read.labels.tolist() == [0, 0, 0, 1, *[2] * 5, 3, 3, 3]


def test_named_classes(tmp_path):
    save_folder(IMAGES[:2], torch.tensor([1, 0]), tmp_path, ["cat", "dog"])
    with Image.open(tmp_path / "dog" / "00000.png") as picture:
        assert picture.mode == "RGB" and picture.size == (4, 4)


@pytest.mark.parametrize("name", ["T - shirt / top", "/etc", "..", ".hidden"])
def test_a_name_that_is_no_folders_is_refused(name, tmp_path):
    """Fashion-MNIST on the hub calls its first class "T - shirt / top", which would be read as "T - shirt "."""
    with pytest.raises(ConfigurationError, match="no folder can have the name"):
        save_folder(IMAGES[:2], torch.tensor([1, 1]), tmp_path / "out", [name, "trouser"])
    assert not (tmp_path / "out").exists()


def test_arrays_come_back(tmp_path):
    with (tmp_path / "x.npz").open("wb") as file:
        save_arrays(IMAGES, LABELS, file, [str(label) for label in range(11)])
    read = read_images(tmp_path / "x.npz")
    assert torch.equal(read.batch()[0], IMAGES) and torch.equal(read.labels, LABELS) and read.num_classes == 11
    without = io.BytesIO()
    save_arrays(IMAGES, LABELS, without)
    assert np.load(io.BytesIO(without.getvalue())).files == ["images", "labels"]


def test_what_cannot_be_written(tmp_path):
    with pytest.raises(ConfigurationError, match="4 channels"):
        save_folder(torch.zeros(1, 4, 2, 2), torch.zeros(1, dtype=torch.int64), tmp_path)
    (tmp_path / "taken").write_text("")
    with pytest.raises(OutputPathError, match="taken"):
        save_folder(IMAGES, LABELS, tmp_path / "taken")


def test_first_of_each():
    assert first_of_each(LABELS, 2).tolist() == [0, 1, 2, 3, 4, 6, 11]
    assert first_of_each(LABELS[:0], 2).tolist() == []
