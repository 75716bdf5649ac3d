"""One ladder of kinds: what is read as class folders is what names its classes by folders."""

from __future__ import annotations

import numpy as np
import pytest

from dither.data import classes_are_folders, read_images
from dither.errors import DataError
from pictures import class_folders, idx_folder

IMAGES, LABELS = np.zeros((3, 4, 4), np.uint8), np.array([0, 1, 0])


def test_class_folders(tmp_path):
    root = class_folders(tmp_path / "fruit", {"pear": 1, "apple": 2})
    assert classes_are_folders(root) and classes_are_folders(str(root))
    assert read_images(root).class_names == ("apple", "pear")
    assert not classes_are_folders(f"hf:{root}")


def test_idx_of_either_split(tmp_path):
    root = idx_folder(tmp_path, IMAGES, LABELS)
    assert not classes_are_folders(root) and read_images(root).class_names == tuple("0123456789")
    for file in root.iterdir():
        file.rename(root / file.name.replace("train", "t10k"))
    assert not classes_are_folders(root)
    with pytest.raises(DataError, match="no train-images"):
        read_images(root)


def test_files(tmp_path):
    np.savez(tmp_path / "a.npz", images=IMAGES[:, None], labels=LABELS)
    assert not classes_are_folders(tmp_path / "a.npz")
    assert read_images(tmp_path / "a.npz", num_classes=2).labels.tolist() == [0, 1, 0]
    (tmp_path / "a.txt").touch()
    for name, said in (("a.txt", "no data set that dither reads"), ("b.npz", "there is no")):
        assert not classes_are_folders(tmp_path / name)
        with pytest.raises(DataError, match=said):
            read_images(tmp_path / name)
