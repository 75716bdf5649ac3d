"""Folders of images: what is an example, what is left out, what is refused."""

from __future__ import annotations

import os

import pytest
import torch

from dither.data import checking, read_images
from dither.errors import BrokenImagesError, DataError
from pictures import class_folders, ramp


def test_classes_order_and_values(tmp_path):
    data = read_images(class_folders(tmp_path / "set", {"dog": 2, "cat": 3}))
    assert data.class_names == ("cat", "dog")
    assert data.labels.tolist() == [0, 0, 0, 1, 1]
    assert (data.name, data.image_size, data.channels, data.left_out) == ("set", 6, 3, ())
    image, label = data[4]
    assert image.shape == (3, 6, 6) and image.dtype == torch.float32 and label == 1
    assert image[0, 0, 0] == pytest.approx(10 / 127.5 - 1) and image[0, 0, -1] == 1


def test_given_class_names_are_the_label_set(tmp_path):
    root = class_folders(tmp_path, {"dog": 2, "cat": 3})
    data = read_images(root, class_names=["dog", "cow", "cat"])
    assert data.labels.tolist() == [2, 2, 2, 0, 0] and data.num_classes == 3
    with pytest.raises(DataError, match="the folder 'dog', which is not in"):
        read_images(root, class_names=["cat"])


def test_one_class_is_allowed_and_no_class_is_not(tmp_path):
    assert read_images(class_folders(tmp_path / "one", {"cat": 2})).num_classes == 1
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no subfolders"):
        read_images(tmp_path / "empty")
    (tmp_path / "bare" / "cat").mkdir(parents=True)
    with pytest.raises(DataError, match="1 subfolders and no images"):
        read_images(tmp_path / "bare")
    flat = class_folders(tmp_path / "flat", {"cat": 2}) / "cat"
    with pytest.raises(DataError, match="no subfolders"):
        read_images(flat)


def test_what_is_no_image_is_listed(tmp_path):
    root = class_folders(tmp_path, {"cat": 2, "dog": 2})
    (root / "readme.txt").write_text("hello")
    (root / "cat" / "notes.csv").write_text("1,2")
    (root / "cat" / ".hidden.png").write_text("not an image")
    (root / ".cache").mkdir()
    data = read_images(root)
    assert len(data) == 4
    assert data.left_out == ("readme.txt: lies in no class folder", "cat/notes.csv: no image by its name")


def test_folders_inside_a_class_belong_to_it(tmp_path):
    root = class_folders(tmp_path, {"cat": 1, "dog": 1})
    (root / "cat" / "tabby").mkdir()
    ramp(50).save(root / "cat" / "tabby" / "0.png")
    assert read_images(root).labels.tolist() == [0, 0, 1]


def test_train_and_test_subfolders_are_splits(tmp_path):
    class_folders(tmp_path / "train", {"cat": 2, "dog": 1})
    class_folders(tmp_path / "test", {"cat": 1, "dog": 1})
    assert read_images(tmp_path).labels.tolist() == [0, 0, 1]
    assert read_images(tmp_path, split="held-out").labels.tolist() == [0, 1]
    with pytest.raises(DataError, match="no held-out part"):
        read_images(tmp_path / "train", split="held-out")


def test_held_out_images_are_not_trained_as_a_class(tmp_path):
    class_folders(tmp_path, {"cat": 2, "dog": 1})
    class_folders(tmp_path / "test", {"cat": 1, "dog": 1})
    with pytest.raises(DataError, match="has test with folders in it, and no train"):
        read_images(tmp_path)
    named = read_images(tmp_path, class_names=["cat", "dog", "test"])
    assert named.labels.tolist() == [0, 0, 1, 2, 2]


def test_broken_images_are_counted_and_named(tmp_path):
    root = class_folders(tmp_path, {"cat": 4, "dog": 3})
    whole = (root / "cat" / "1.png").read_bytes()
    (root / "cat" / "1.png").write_bytes(whole[:40])
    (root / "dog" / "0.png").write_text("hello")
    (root / "dog" / "gone.png").symlink_to(root / "nowhere.png")
    with pytest.raises(BrokenImagesError) as error:
        read_images(root)
    assert "3 of 8 images" in error.value.what
    assert "cat/1.png: " in error.value.what
    assert "dog/0.png: no image that Pillow knows" in error.value.what
    assert "dog/gone.png: [Errno 2]" in error.value.what
    assert "skip_broken" in error.value.fix
    data = read_images(root, skip_broken=True)
    assert data.labels.tolist() == [0, 0, 0, 1, 1] and len(data.left_out) == 3
    assert data[1][0][0, 0, 0] == pytest.approx(20 / 127.5 - 1)  # 2.png, for 1.png is out


def test_long_lists_are_cut_and_nothing_left_is_refused(tmp_path):
    root = class_folders(tmp_path, {"cat": 104})
    for file in (root / "cat").iterdir():
        file.write_bytes(b"")
    with pytest.raises(BrokenImagesError, match="and 4 more"):
        read_images(root)
    with pytest.raises(BrokenImagesError, match="104 of 104"):
        read_images(root, skip_broken=True)


def test_several_sizes_need_a_size(tmp_path):
    root = class_folders(tmp_path, {"cat": 2})
    ramp(0, (8, 4)).save(root / "cat" / "wide.png")
    with pytest.raises(DataError, match=r"2 sizes: .*4 x 8 \(cat/wide.png\)"):
        read_images(root)
    assert read_images(root, image_size=4).batch()[0].shape == (3, 3, 4, 4)


def test_not_square(tmp_path):
    root = class_folders(tmp_path, {"cat": 2}, size=(8, 4))
    with pytest.raises(DataError, match="4 x 8, not square"):
        read_images(root)


def test_grey_and_colour_need_channels(tmp_path):
    root = class_folders(tmp_path, {"cat": 2})
    ramp(0, channels=1).save(root / "cat" / "grey.png")
    with pytest.raises(DataError, match=r"grey and colour: .*cat/grey.png"):
        read_images(root)
    for channels in (1, 3):
        assert read_images(root, channels=channels)[2][0].shape == (channels, 6, 6)


def test_links(tmp_path):
    """A class folder may be a link; loops end; nothing is an example twice."""
    root = class_folders(tmp_path / "set", {"cat": 2})
    class_folders(tmp_path / "elsewhere", {"dog": 1})
    (root / "dog").symlink_to(tmp_path / "elsewhere" / "dog")
    (root / "cat" / "up").symlink_to(root)
    data = read_images(root)
    assert data.labels.tolist() == [0, 0, 1]
    assert data.left_out == ("cat/up: a link to a folder",)
    (root / "round").symlink_to(root)
    with pytest.raises(DataError, match="reached by two paths"):
        read_images(root)
    (root / "round").unlink()
    os.link(root / "cat" / "0.png", root / "cat" / "again.png")
    with pytest.raises(DataError, match=r"1 files are reached by two paths: .*0.png and .*again.png"):
        read_images(root)
    os.unlink(root / "cat" / "again.png")
    (root / "self").symlink_to(root / "self")
    with pytest.raises(DataError, match="self"):
        read_images(root)


def test_large_folders_are_decoded_when_asked_for(tmp_path, monkeypatch):
    root = class_folders(tmp_path, {"cat": 5, "dog": 5})
    (root / "cat" / "3.png").write_bytes(b"")
    held = read_images(root, skip_broken=True)
    monkeypatch.setattr(checking, "HELD_BYTES", 300)
    seen = []
    lazy = read_images(root, skip_broken=True, progress=lambda done, count: seen.append((done, count)))
    assert isinstance(held.pixels, checking.Held) and isinstance(lazy.pixels, checking.Decoded)
    assert seen == [(10, 10)]
    for one, other in zip(held.batch(), lazy.batch(), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(lazy[5][0], held[5][0])
    (root / "dog" / "4.png").unlink()
    with pytest.raises(DataError, match="no longer"):
        lazy[8]
