"""Samples from a finished run."""

from __future__ import annotations

import shutil

import numpy
import pytest
from PIL import Image

from dither.cli.main import main


def test_grid_and_arrays(finished_run, tmp_path):
    png, npz = tmp_path / "threes.png", tmp_path / "threes.npz"
    words = ["--label", "3", "--count", "16", "--guidance", "2", f"--output={png}", f"--npz={npz}"]
    assert main(["sample", str(finished_run), *words]) == 0
    with Image.open(png) as grid:
        assert grid.width > 16 * 8
    arrays = numpy.load(npz)
    assert arrays["images"].shape == (16, 1, 8, 8)
    assert arrays["labels"].tolist() == [3] * 16
    assert abs(arrays["images"]).max() <= 1


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpm-solver++"])
def test_every_sampler_and_the_seed(sampler, finished_run, tmp_path):
    drawn = []
    for name in "ab":
        npz = tmp_path / f"{name}.npz"
        words = ["--count=2", f"--sampler={sampler}", "--steps=4", "--seed=1", f"--npz={npz}"]
        assert main(["sample", str(finished_run), *words, f"--output={tmp_path / 'grid.png'}"]) == 0
        drawn.append(numpy.load(npz))
    assert drawn[0]["labels"].tolist() == [label for label in range(10) for _ in range(2)]
    assert (drawn[0]["images"] == drawn[1]["images"]).all()


def test_raw_weights_differ_from_ema(finished_run, tmp_path):
    images = {}
    for weights in ("ema", "raw"):
        npz = tmp_path / f"{weights}.npz"
        words = ["--count=1", "--seed=1", f"--weights={weights}", f"--npz={npz}", f"--output={tmp_path / 'x.png'}"]
        assert main(["sample", str(finished_run), *words]) == 0
        images[weights] = numpy.load(npz)["images"]
    assert (images["ema"] != images["raw"]).any()


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--label", "12"], "label 12 is outside 0..9"),
        (["--label", "-1"], "label -1 is outside 0..9"),
        (["--label", "three"], "three"),
        (["--count", "0"], "count 0"),
        (["--sampler", "euler"], "euler"),
        (["--steps", "0"], "steps 0"),
        (["--steps", "5000"], "steps 5000"),
        (["--output", "/nowhere/x.png"], "/nowhere/x.png"),
        (["--npz", "/nowhere/x.npz"], "/nowhere/x.npz"),
        (["--output", "x.unknown"], "x.unknown"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_option_is_named(words, named, failure, finished_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert named in failure("sample", finished_run, *words)
    assert not any(tmp_path.iterdir())


def test_what_is_no_run(failure, finished_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "is not a folder" in failure("sample", "missing")
    assert "did not write it" in failure("sample", ".")
    copy = tmp_path / "copy"
    shutil.copytree(finished_run, copy)
    (copy / "ema.safetensors").write_text("damaged")
    assert "ema.safetensors is damaged" in failure("sample", copy)
    (copy / "ema.safetensors").unlink()
    assert "ema.safetensors is missing" in failure("sample", copy)
    config = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(config.replace("hidden_size: 16", "hidden_size: 32"))
    assert "do not fit" in failure("sample", copy, "--weights=raw")
