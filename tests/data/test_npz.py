"""Arrays in an .npz."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dither.data import read_images
from dither.errors import BrokenImagesError, ConfigurationError, DataError

GREY = np.random.default_rng(0).uniform(-1, 1, (6, 1, 5, 5)).astype(np.float32)
LABELS = np.array([0, 1, 2, 0, 1, 2])


def save(path, **arrays):
    np.savez(path, **arrays)
    return path


def test_floats_are_kept_as_they_are(tmp_path):
    data = read_images(save(tmp_path / "a.npz", images=GREY, labels=LABELS), num_classes=3)
    images, labels = data.batch()
    assert torch.equal(images, torch.from_numpy(GREY))
    assert labels.tolist() == LABELS.tolist() and labels.dtype == torch.int64
    image, label = data[-1]
    assert torch.equal(image, images[5]) and label == 2


@pytest.mark.parametrize("shape", [(6, 5, 5), (6, 1, 5, 5), (6, 5, 5, 1), (6, 3, 5, 5), (6, 5, 5, 3)])
def test_bytes_in_every_layout(shape, tmp_path):
    pixels = np.random.default_rng(1).integers(0, 256, shape).astype(np.uint8)
    data = read_images(save(tmp_path / "a.npz", images=pixels, labels=LABELS, class_names=["x", "y", "z"]))
    assert data.class_names == ("x", "y", "z")
    assert data[0][0].shape == (data.channels, 5, 5)
    first = pixels[0].reshape(-1)[0] / 127.5 - 1
    assert data[0][0].flatten()[0] == pytest.approx(first, abs=1e-6)


def test_the_label_set_is_not_taken_from_the_labels(tmp_path):
    file = save(tmp_path / "a.npz", images=GREY, labels=LABELS)
    with pytest.raises(DataError, match="which classes there are"):
        read_images(file)
    assert read_images(file, num_classes=7).num_classes == 7
    with pytest.raises(DataError, match=r"2 labels .* outside 0..1: 2 \(example 2\), 2 \(example 5\)"):
        read_images(file, num_classes=2)
    with pytest.raises(ConfigurationError, match="not distinct"):
        read_images(file, class_names=["a", "a", "b"])
    with pytest.raises(ConfigurationError, match="3 class names and num_classes 4"):
        read_images(file, class_names=["a", "b", "c"], num_classes=4)


def test_values_out_of_range_are_named_and_can_be_left_out(tmp_path):
    images = GREY.copy()
    images[1, 0, 0, 0], images[4, 0, 2, 2] = np.nan, 1.5
    file = save(tmp_path / "a.npz", images=images, labels=LABELS)
    with pytest.raises(BrokenImagesError) as error:
        read_images(file, num_classes=3)
    assert "2 of 6 images" in error.value.what
    assert "example 1: values that are not finite" in error.value.what
    assert "example 4: values outside [-1, 1]" in error.value.what
    data = read_images(file, num_classes=3, skip_broken=True)
    assert data.labels.tolist() == [0, 2, 0, 2]
    assert torch.equal(data.batch()[0], torch.from_numpy(GREY[[0, 2, 3, 5]]))
    assert len(data.left_out) == 2


class Trap:
    """Unpickling this would leave a file behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_pickle_is_never_loaded(tmp_path):
    touched = tmp_path / "touched"
    file = tmp_path / "a.npz"
    np.savez(file, images=np.array([Trap(touched)], dtype=object), labels=LABELS)
    with pytest.raises(DataError, match="without running code"):
        read_images(file, num_classes=3)
    assert not touched.exists()


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"pictures": GREY, "labels": LABELS}, "has pictures, labels, but no images"),
        ({"images": GREY}, "no labels"),
        ({"images": GREY, "labels": LABELS[:5]}, r"6 images and labels of shape \(5,\)"),
        ({"images": GREY, "labels": LABELS[:, None]}, r"labels of shape \(6, 1\)"),
        ({"images": GREY, "labels": LABELS.astype(float)}, "labels of type float64"),
        ({"images": GREY, "labels": LABELS - 1}, r"outside 0..2: -1 \(example 0\)"),
        ({"images": GREY[:0], "labels": LABELS[:0]}, "no images"),
        ({"images": GREY.astype(int), "labels": LABELS}, "images of type int64"),
        ({"images": GREY[:, 0, 0], "labels": LABELS}, r"images of shape \(6, 5\)"),
        ({"images": GREY[..., :4], "labels": LABELS}, "5 x 4, not square"),
    ],
)
def test_wrong_arrays_are_refused(arrays, message, tmp_path):
    with pytest.raises(DataError, match=message):
        read_images(save(tmp_path / "a.npz", **arrays), num_classes=3)


def test_files_that_are_none(tmp_path):
    (tmp_path / "a.npz").write_bytes(b"not a zip")
    (tmp_path / "b.csv").write_text("")
    whole = save(tmp_path / "c.npz", images=GREY, labels=LABELS).read_bytes()
    (tmp_path / "c.npz").write_bytes(whole[: len(whole) // 2])
    for name in "ac":
        with pytest.raises(DataError, match="cannot be read"):
            read_images(tmp_path / f"{name}.npz", num_classes=3)
    with pytest.raises(DataError, match="no data set that dither reads"):
        read_images(tmp_path / "b.csv")
    with pytest.raises(DataError, match="there is no"):
        read_images(tmp_path / "missing")


@pytest.mark.parametrize("kind", [">f4", "<f2", "f8"])
def test_floats_of_any_kind_are_read(tmp_path, kind):
    pixels = np.linspace(-1.0, 1.0, 4 * 8 * 8).reshape(4, 8, 8)
    labels = np.array([0, 1, 2, 1], ">i8")
    data = read_images(save(tmp_path / "a.npz", images=pixels.astype(kind), labels=labels), num_classes=3)
    images, found = data.batch()
    assert images.dtype == torch.float32 and found.tolist() == labels.tolist()
    assert np.abs(images[:, 0].numpy() - pixels).max() <= 1e-3
