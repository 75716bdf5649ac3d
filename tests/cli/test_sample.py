"""Samples from a finished run."""

from __future__ import annotations

import json
import math
import shutil

import numpy
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from dither.cli.main import main
from dither.data import read_images
from shortened import TINY


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


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpm-solver++", "edm"])
def test_every_sampler_and_the_seed(sampler, finished_run, tmp_path):
    drawn = []
    for name in "ab":
        npz = tmp_path / f"{name}.npz"
        words = ["--count=2", f"--sampler={sampler}", "--steps=4", "--seed=1", f"--npz={npz}"]
        assert main(["sample", str(finished_run), *words]) == 0
        drawn.append(numpy.load(npz))
    assert drawn[0]["labels"].tolist() == [label for label in range(10) for _ in range(2)]
    assert (drawn[0]["images"] == drawn[1]["images"]).all()


def test_churn_changes_the_images(finished_run, tmp_path):
    drawn = []
    for s_churn in (0, 3):
        npz = tmp_path / f"{s_churn}.npz"
        words = ["--label=3", "--count=2", "--sampler=edm", f"--s_churn={s_churn}", "--s_noise=1.01", "--seed=1"]
        assert main(["sample", str(finished_run), *words, f"--npz={npz}"]) == 0
        drawn.append(numpy.load(npz)["images"])
    assert (drawn[0] != drawn[1]).any()


def test_a_path_is_said_as_it_is(finished_run, tmp_path, capsys):
    """Brackets would be taken for rich's markup, and left out."""
    assert main(["sample", str(finished_run), "--count=1", f"--output={tmp_path / 'grid [final].png'}"]) == 0
    assert "grid [final].png" in capsys.readouterr().out


def test_a_folder_is_a_data_set(finished_run, tmp_path):
    folder, npz = tmp_path / "synthetic", tmp_path / "same.npz"
    assert main(["sample", str(finished_run), "--count=3", "--batch_size=7", f"--folder={folder}", f"--npz={npz}"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["same.npz", "synthetic"]
    read, arrays = read_images(folder), read_images(npz, num_classes=10)
    assert read.class_names == tuple("0123456789")
    assert read.labels.tolist() == arrays.labels.tolist() == [label for label in range(10) for _ in range(3)]
    torch.testing.assert_close(read.batch()[0], arrays.batch()[0], atol=1 / 255 + 1e-6, rtol=0)


def test_nothing_is_replaced_unasked(failure, finished_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["sample", str(finished_run), "--count=1"]
    assert main(words) == 0
    kept = (tmp_path / "samples.png").read_bytes()
    assert "samples.png is there already" in failure(*words)
    assert (tmp_path / "samples.png").read_bytes() == kept
    assert main([*words, "--overwrite"]) == 0
    assert (tmp_path / "samples.png").read_bytes() != kept
    assert main([*words, "--folder=out"]) == 0
    assert "out is not empty" in failure(*words, "--folder=out", "--overwrite")
    (tmp_path / "x.npz").write_text("mine")
    assert "x.npz is there already" in failure(*words, "--npz=x.npz")
    assert "--npz x.npz" in failure(*words, "--npz=x") and not (tmp_path / "x").exists()
    assert (tmp_path / "x.npz").read_text() == "mine"


def test_raw_weights_differ_from_ema(finished_run, tmp_path):
    images = {}
    for weights in ("ema", "raw"):
        npz = tmp_path / f"{weights}.npz"
        words = ["--count=1", "--seed=1", f"--weights={weights}", f"--npz={npz}"]
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
        (["--sampler", "unknown"], "unknown"),
        (["--sampler", "euler"], "not for prediction"),
        (["--sampler", "ddim", "--s_churn", "1"], "has no churn"),
        (["--sampler", "edm", "--s_churn", "-1"], "s_churn -1"),
        (["--sampler", "edm", "--s_min", "3", "--s_max", "2"], "s_max 2"),
        (["--vae", "nowhere"], "nothing has to decode"),
        (["--batch_size", "0"], "batch_size 0"),
        (["--folder", "/nowhere/x"], "/nowhere/x"),
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


def test_nothing_is_drawn_for_a_picture_that_cannot_be_named(failure, finished_run, tmp_path, monkeypatch):
    monkeypatch.setattr("dither.cli.sample.draw", pytest.fail)
    words = ["--npz", tmp_path / "many.npz", "--output", tmp_path / "grid"]
    assert "grid.png" in failure("sample", finished_run, *words)


def test_a_run_that_has_diverged(failure, finished_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    weights = load_file(run / "ema.safetensors")
    save_file({name: torch.full_like(tensor, math.inf) for name, tensor in weights.items()}, run / "ema.safetensors")
    images = tmp_path / "images.npz"
    assert "diverged" in failure("sample", run, "--count", 1, "--npz", images) and not images.exists()
    assert "diverged" in failure("evaluate", run, "--count", 2)


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


def test_the_histogram_of_the_private_labels_is_in_nothing_that_is_drawn(tmp_path):
    """One class ten times as frequent, one that never occurs: what is drawn knows the public label set alone."""
    labels = numpy.repeat([0, 1], [100, 10])
    numpy.savez(tmp_path / "data.npz", images=numpy.random.default_rng(0).uniform(-1, 1, (110, 1, 8, 8)), labels=labels)
    words = [f"--data.path={tmp_path / 'data.npz'}", "--data.num_classes=3", f"--output={tmp_path / 'run'}"]
    assert main(["train", *TINY, "--steps=2", "--expected_batch_size=20", "--noise_multiplier=1", *words]) == 0
    assert main(["sample", str(tmp_path / "run"), "--count=5", f"--npz={tmp_path / 'drawn.npz'}"]) == 0
    with numpy.load(tmp_path / "drawn.npz") as drawn:
        assert numpy.bincount(drawn["labels"]).tolist() == [5, 5, 5]
    assert (
        main(
            [
                "evaluate",
                str(tmp_path / "run"),
                "--count=4",
                "--classifiers",
                "logistic regression",
                "--data.path",
                str(tmp_path / "data.npz"),
                "--data.num_classes=3",
            ]
        )
        == 2
    )  # no held-out part
    facts = json.loads((tmp_path / "run" / "run.json").read_text())["images"]
    assert facts["num_classes"] == 3 and "100" not in json.dumps(facts)
