"""IDX files: Fashion-MNIST as Debian has it, and files that are damaged."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch

from dither.data import read_images
from dither.errors import DataError
from pictures import idx_bytes, idx_folder

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
IMAGES = np.arange(5 * 4 * 4, dtype=np.uint8).reshape(5, 4, 4)
LABELS = np.array([0, 1, 2, 1, 0])


@pytest.mark.skipif(not FASHION_MNIST.is_dir(), reason="needs Debian's dataset-fashion-mnist")
def test_fashion_mnist():
    for split, count in (("train", 60_000), ("held-out", 10_000)):
        data = read_images(FASHION_MNIST, split=split)
        assert len(data) == count and (data.image_size, data.channels) == (28, 1)
        images, labels = data.batch(range(1000))
        assert images.shape == (1000, 1, 28, 28) and images.dtype == torch.float32
        assert images.min() == -1 and images.max() == 1
        assert labels.unique().tolist() == list(range(10))
    assert data.class_names[7] == "sneaker"


@pytest.mark.parametrize("packed", [True, False])
def test_values_and_labels(packed, tmp_path):
    data = read_images(idx_folder(tmp_path, IMAGES, LABELS, packed=packed))
    images, labels = data.batch()
    assert torch.equal(images[:, 0], torch.from_numpy(IMAGES).float() / 127.5 - 1)
    assert labels.tolist() == LABELS.tolist()
    assert data.num_classes == 10  # by the format's custom, not by the labels that occur
    assert read_images(tmp_path, num_classes=3).num_classes == 3
    assert read_images(tmp_path, class_names=["a", "b", "c"]).class_names == ("a", "b", "c")


def test_label_outside_the_label_set_is_named(tmp_path):
    folder = idx_folder(tmp_path, IMAGES, LABELS)
    with pytest.raises(DataError, match=r"1 labels .* outside 0..1: 2 \(example 2\)"):
        read_images(folder, num_classes=2)


def _gzip(content):
    """The same bytes in every second: they name the tests, which each worker collects for itself."""
    return gzip.compress(content, mtime=0)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (_gzip(idx_bytes(IMAGES))[:-30], None, "cannot be read"),
        (b"no gzip at all", None, "cannot be read"),
        (_gzip(b"\0\0\x08\x01" + idx_bytes(IMAGES)[4:]), None, "begins with 00 00 08 01"),
        (_gzip(b"\0\0\x0d\x03" + idx_bytes(IMAGES)[4:]), None, "begins with 00 00 0d 03"),
        (_gzip(b""), None, "begins with nothing"),
        (_gzip(idx_bytes(IMAGES)[:10]), None, "holds nothing"),
        (_gzip(idx_bytes(IMAGES)[:-1]), None, "5 x 4 x 4 bytes of data and has 79"),
        (_gzip(idx_bytes(IMAGES) + b"x"), None, "5 x 4 x 4 bytes of data and has 81"),
        (None, _gzip(idx_bytes(LABELS[:4])), "5 images and labels of shape"),
        (_gzip(idx_bytes(IMAGES[:0])), _gzip(idx_bytes(LABELS[:0])), "no images"),
    ],
)
def test_damaged_files_are_refused(images, labels, message, tmp_path):
    folder = idx_folder(tmp_path, IMAGES, LABELS)
    for name, content in (("images-idx3", images), ("labels-idx1", labels)):
        if content is not None:
            (folder / f"train-{name}-ubyte.gz").write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_images(folder)


def test_missing_part(tmp_path):
    folder = idx_folder(tmp_path, IMAGES, LABELS)
    with pytest.raises(DataError, match="no t10k-images"):
        read_images(folder, split="held-out")
    (folder / "train-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(DataError, match="no train-labels"):
        read_images(folder)
