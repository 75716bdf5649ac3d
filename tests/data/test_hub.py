"""Hugging Face datasets, saved by `save_to_disk`."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from dither.data import read_images
from dither.data.hub import Address, address_of
from dither.errors import BrokenImagesError, DataError
from pictures import class_folders, ramp

datasets = pytest.importorskip("datasets")
pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

FEATURES = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])}


@pytest.fixture(scope="module", autouse=True)
def quiet():
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def made(columns=None, features=None):
    columns = columns or {"image": [ramp(10 * i) for i in range(4)], "label": [0, 1, 1, 0]}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features or FEATURES))


def test_a_saved_dataset(tmp_path):
    made().save_to_disk(tmp_path / "pets")
    for path in (tmp_path / "pets", f"hf:{tmp_path / 'pets'}"):
        data = read_images(path)
        assert (data.name, data.class_names, data.image_size, data.channels) == ("pets", ("cat", "dog"), 6, 3)
        assert data.labels.tolist() == [0, 1, 1, 0]
        assert data[2][0][0, 0, 0] == pytest.approx(20 / 127.5 - 1)
    assert read_images(tmp_path / "pets", image_size=4, channels=1)[0][0].shape == (1, 4, 4)
    with pytest.raises(DataError, match="has no parts"):
        read_images(tmp_path / "pets", split="held-out")


def test_parts(tmp_path):
    data = made()
    datasets.DatasetDict({"train": data, "validation": data.select([1])}).save_to_disk(tmp_path / "parts")
    assert len(read_images(tmp_path / "parts")) == 4
    assert read_images(tmp_path / "parts", split="held-out").labels.tolist() == [1]
    datasets.DatasetDict({"extra": data}).save_to_disk(tmp_path / "other")
    with pytest.raises(DataError, match="the parts extra, and none called train"):
        read_images(tmp_path / "other")


def test_a_dataset_without_examples_is_named(tmp_path):
    made().filter(lambda example: False).save_to_disk(tmp_path / "empty")
    with pytest.raises(DataError, match="has no images"):
        read_images(tmp_path / "empty")


def test_broken_images_are_named(tmp_path):
    stored = [{"bytes": b"not an image", "path": None}, None, ramp(0)]
    made({"image": stored, "label": [0, 1, 1]}).save_to_disk(tmp_path / "pets")
    with pytest.raises(BrokenImagesError) as error:
        read_images(tmp_path / "pets")
    assert "example 0: no image that Pillow knows" in error.value.what
    assert "example 1: there is no image" in error.value.what
    assert read_images(tmp_path / "pets", skip_broken=True).labels.tolist() == [1]


def test_columns_are_found_or_named(tmp_path):
    pictures = [ramp(0), ramp(10)]
    columns = {"photo": pictures, "mask": pictures, "kind": [1, 0]}
    features = {"photo": datasets.Image(), "mask": datasets.Image(), "kind": datasets.Value("int64")}
    made(columns, features).save_to_disk(tmp_path / "pets")
    with pytest.raises(DataError, match="2 columns of type Image: photo, mask"):
        read_images(tmp_path / "pets")
    with pytest.raises(DataError, match="0 columns of type ClassLabel"):
        read_images(tmp_path / "pets", image_column="photo")
    with pytest.raises(DataError, match="no image column 'kind'"):
        read_images(tmp_path / "pets", image_column="kind")
    chosen = {"image_column": "photo", "label_column": "kind"}
    with pytest.raises(DataError, match="which classes there are"):
        read_images(tmp_path / "pets", **chosen)
    assert read_images(tmp_path / "pets", **chosen, num_classes=2).labels.tolist() == [1, 0]


def test_no_other_column_is_decoded(tmp_path):
    stored = {"image": [ramp(0), ramp(10)], "mask": [{"bytes": b"junk", "path": None}] * 2, "label": [0, 1]}
    made(stored, {**FEATURES, "mask": datasets.Image()}).save_to_disk(tmp_path / "pets")
    assert read_images(tmp_path / "pets", image_column="image").labels.tolist() == [0, 1]


@pytest.mark.parametrize("options", [{"type": "torch", "columns": ["label"]}, {"type": "pandas"}])
def test_a_saved_format_hides_and_changes_nothing(options, tmp_path):
    made().with_format(**options).save_to_disk(tmp_path / "pets")
    data = read_images(tmp_path / "pets")
    assert data.labels.tolist() == [0, 1, 1, 0] and data[2][0][0, 0, 0] == pytest.approx(20 / 127.5 - 1)


def test_labels_are_no_images(tmp_path):
    made().save_to_disk(tmp_path / "pets")
    with pytest.raises(DataError, match="no label column 'image'"):
        read_images(tmp_path / "pets", label_column="image", num_classes=2)


def test_an_image_of_neither_bytes_nor_path_is_named(tmp_path, monkeypatch):
    """As others write them; `datasets` itself would not."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    images = pa.array([{"bytes": None, "path": None}, {"bytes": b"junk", "path": None}], type=datasets.Image().pa_type)
    table = pa.table({"image": images, "label": [0, 1]}).cast(datasets.Features(FEATURES).arrow_schema)
    (tmp_path / "pets").mkdir()
    pq.write_table(table, tmp_path / "pets" / "train.parquet")
    with pytest.raises(BrokenImagesError, match="example 0: there is no image"):
        read_images(f"hf:{tmp_path / 'pets'}")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a/b", Address("a/b")),
        ("a/b.c@v1.0", Address("a/b.c", "v1.0")),
        ("a/b:x@y", Address("a/b", None, "x@y")),
        ("a/b@refs/convert/parquet:x", Address("a/b", "refs/convert/parquet", "x")),
    ],
)
def test_addresses(text, expected):
    assert address_of(text) == expected


def test_configurations(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    root = tmp_path / "pets"
    for part, count in (("a", 2), ("b", 3)):
        class_folders(root / part / "train", {"cat": count, "dog": 1})
    parts = "- config_name: small\n  data_dir: a\n- config_name: large\n  data_dir: b\n"
    (root / "README.md").write_text(f"---\nconfigs:\n{parts}---\n")
    assert len(read_images(f"hf:{root}:small")) == 3
    data = read_images(f"hf:{root}:large")
    assert len(data) == 4 and data.class_names == ("cat", "dog") and data.name == "pets"
    for name, said in ((root, "none is named"), (f"{root}:huge", "not huge")):
        with pytest.raises(DataError, match=f"has the configurations small, large, and {said}") as error:
            read_images(f"hf:{name}")
        assert error.value.fix == f"name one: --data.path hf:{root}:small"
    with pytest.raises(DataError, match="cannot be opened"):
        read_images(f"hf:{tmp_path / 'nowhere'}:small")


def test_a_folder_whose_name_holds_the_signs_is_taken_whole(tmp_path):
    made().save_to_disk(tmp_path / "pets@home:all")
    for path in (tmp_path / "pets@home:all", f"hf:{tmp_path / 'pets@home:all'}"):
        assert len(read_images(path)) == 4


def test_a_revision_is_asked_for(tmp_path):
    """Of a hub on this machine, which has nothing and keeps what it is asked."""
    asked = []

    class Empty(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(404)

        def do_HEAD(self):
            self.do_GET()

        def log_message(self, *arguments):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Empty) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        settings = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path)}
        settings |= {
            "HF_HUB_OFFLINE": "0",
            "HF_DATASETS_OFFLINE": "0",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }
        code = "from dither.data import read_images; read_images('hf:owner/pets@v1.5:small')"
        made = subprocess.run([sys.executable, "-c", code], env=os.environ | settings, capture_output=True, text=True)
        server.shutdown()
    assert "DataError" in made.stderr and "owner/pets" in made.stderr
    assert any("owner/pets" in path and "v1.5" in path for path in asked), asked


def test_unlabelled_examples_are_refused(tmp_path):
    made({"image": [ramp(0), ramp(1)], "label": [-1, 1]}).save_to_disk(tmp_path / "pets")
    with pytest.raises(DataError, match=r"-1 \(example 0\)"):
        read_images(tmp_path / "pets")


def test_damaged_folder(tmp_path):
    made().save_to_disk(tmp_path / "pets")
    next((tmp_path / "pets").glob("*.arrow")).write_bytes(b"")
    with pytest.raises(DataError, match="cannot be opened"):
        read_images(tmp_path / "pets")


def test_without_the_package(tmp_path):
    """In a process where importing it fails, as where it is not installed."""
    made().save_to_disk(tmp_path / "pets")
    code = (
        "import sys; sys.modules['datasets'] = None\n"
        "from dither.data import read_images\n"
        "from dither.errors import MissingPackageError\n"
        f"try: read_images({str(tmp_path / 'pets')!r})\n"
        "except MissingPackageError as error: print(error)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "the package datasets is not installed" in found.stdout
    assert "pip install 'dither[datasets]'" in found.stdout
