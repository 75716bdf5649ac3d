"""`dither train --data.*`: from pictures on disk to samples by class name, and what is refused before any work."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import yaml
from safetensors.torch import load_file

from dither.cli.main import main
from pictures import class_folders, idx_folder, ramp
from shortened import TINY

SHORT = [*TINY, "--steps=2", "--expected_batch_size=6", "--noise_multiplier=1"]
FRUIT = {"apple": 6, "pear": 6}


def test_a_folder_of_images(tmp_path, capsys, monkeypatch):
    """Train, resume from elsewhere, sample by name, verify; broken images named, then left out."""
    root, run = class_folders(tmp_path / "fruit", FRUIT, size=(20, 16)), tmp_path / "run"
    (root / "pear" / "3.png").write_bytes(b"broken")
    words = ["--data.path=fruit", "--data.image_size=12", "--data.channels=1"]
    monkeypatch.chdir(tmp_path)
    assert main(["train", *SHORT, *words, f"--output={run}"]) == 2
    error = capsys.readouterr().err
    assert "1 of 12 images" in error and "pear/3.png" in error and "--data.skip_broken true" in error
    assert not run.exists()

    assert main(["train", *SHORT, *words, "--data.skip_broken=true", f"--output={run}"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "Left out 1 (not private): pear/3.png" in out
    assert "Patches of 6 x 6 pixels" in out
    assert f"dither sample {run} --label pear" in out
    images = json.loads((run / "run.json").read_text())["images"]
    assert images["dataset"] == "fruit" and images["class_names"] == ["apple", "pear"]
    assert (images["input_size"], images["in_channels"], images["num_classes"]) == (12, 1, 2)
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["data"]["path"] == str(root) and config["recipe"]["patch_size"] == 6
    assert json.loads((run / "certificate.json").read_text())["dataset_size"] == 11

    (tmp_path / "away").mkdir()
    monkeypatch.chdir(tmp_path / "away")
    assert main(["train", f"--resume={run}"]) == 0
    assert main(["sample", str(run), "--label", "pear", "0", "--count=2", "--npz=a.npz", "--steps=2"]) == 0
    with np.load("a.npz") as saved:
        assert saved["labels"].tolist() == [1, 1, 0, 0] and saved["images"].shape == (4, 1, 12, 12)
        assert saved["class_names"].tolist() == ["apple", "pear"]
    assert main(["verify", str(run)]) == 0
    assert main(["sample", str(run), "--label", "plum", "--output=b.png"]) == 2
    assert "no class 'plum'" in capsys.readouterr().err


def test_synthetic_images_train_again(tmp_path, finished_run):
    """What `dither sample --npz` writes is a data set."""
    npz = tmp_path / "a.npz"
    assert main(["sample", str(finished_run), "--count=2", f"--npz={npz}", f"--output={tmp_path / 'a.png'}"]) == 0
    assert main(["train", *SHORT, f"--data.path={npz}", f"--output={tmp_path / 'run'}"]) == 0
    assert json.loads((tmp_path / "run" / "run.json").read_text())["images"]["num_classes"] == 10


def test_encode_train_and_decode(vae, tmp_path, capsys, failure):
    root, file = class_folders(tmp_path / "fruit", FRUIT, size=(16, 16)), tmp_path / "fruit.safetensors"
    words = ["encode", f"--data.path={root}", f"--vae={vae}", f"--output={file}", "--batch_size=5"]
    assert main(words) == 0
    assert "12 latents of 4 x 8 x 8" in capsys.readouterr().out
    assert load_file(file)["latents"].shape == (12, 4, 8, 8)
    before = file.read_bytes()
    assert "overwrites nothing" in failure(*words)
    assert file.read_bytes() == before

    run = tmp_path / "run"
    assert main(["train", *SHORT, f"--data.path={file}", f"--output={run}"]) == 0
    images = json.loads((run / "run.json").read_text())["images"]
    assert images["latents"] == {"vae": str(vae), "scaling_factor": 0.5, "shift_factor": 0.25}
    arrays = ["--count=1", "--steps=2", f"--npz={tmp_path / 'drawn.npz'}"]
    assert main(["sample", str(run), *arrays, f"--output={tmp_path / 'a.png'}"]) == 0
    assert np.load(tmp_path / "drawn.npz")["images"].shape[1:] == (3, 16, 16)
    # Without the autoencoder the latents themselves are shown.
    moved = json.loads((run / "run.json").read_text())
    moved["images"]["latents"]["vae"] = str(tmp_path / "gone")
    (run / "run.json").write_text(json.dumps(moved))
    short = ["--count=1", "--steps=2"]
    assert main(["sample", str(run), *short, f"--output={tmp_path / 'b.png'}"]) == 0
    assert "latents are drawn, not images" in capsys.readouterr().out
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "b.png").read_bytes()
    assert "--vae" in failure("sample", run, *short, f"--folder={tmp_path / 'images'}")
    there = ["--folder", str(tmp_path / "images"), f"--vae={vae}"]
    assert main(["sample", str(run), *short, *there]) == 0
    assert (tmp_path / "images" / "apple" / "00000.png").is_file()
    assert "no config.json" in failure("sample", run, *short, f"--vae={tmp_path}")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--data.image_size=7"], "no multiple of 2"),
        (["--data.channels=1"], "the autoencoder takes 3"),
        (["--batch_size=0"], "batch_size"),
        (["--vae=nowhere"], "no config.json"),
        (["--output=a.npz"], ".safetensors"),
        (["--output=/nowhere/a.safetensors"], "cannot be written"),
        (["--posterior=median"], "median"),
        (["--data.path=nowhere"], "there is no"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_encode_refuses_and_leaves_nothing(words, named, vae, tmp_path, failure, monkeypatch):
    class_folders(tmp_path / "fruit", {"apple": 1})
    monkeypatch.chdir(tmp_path)
    usual = ["--data.path=fruit", f"--vae={vae}", "--output=a.safetensors"]
    assert named in failure("encode", *usual, *words)
    assert {path.name for path in tmp_path.iterdir()} == {"fruit"}


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--data.path=nowhere"], "there is no nowhere"),
        (["--data.path=fruit", "--data.channels=2"], "channels"),
        (["--data.path=fruit", "--data.resize=lanczos"], "lanczos"),
        (["--data.path=fruit", "--data.image_size=0"], "image_size 0"),
        (["--data.path=fruit", "--data.class_names=[apple]"], "'pear'"),
        (["--data.path=fruit", "--data.image_size=41"], "does not divide"),
        (["--data.path=fruit", "--recipe.patch_size=5"], "patch_size 5 does not divide"),
        (["--data.path=fruit", "--expected_batch_size=13"], "expected_batch_size"),
        (["--data.path=fruit", "--expected_batch_size=0"], "expected_batch_size 0 is not above 0"),
        (["--data.path=digits", "--data.num_classes=2"], "outside 0..1"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_bad_data_is_named_and_leaves_nothing(words, named, tmp_path, failure, monkeypatch):
    class_folders(tmp_path / "fruit", FRUIT)
    idx_folder(tmp_path / "digits", np.zeros((3, 8, 8)), np.array([0, 1, 2]))
    monkeypatch.chdir(tmp_path)
    assert named in failure("train", *SHORT, *words, "--output=run")
    assert {path.name for path in tmp_path.iterdir()} == {"fruit", "digits"}


def test_the_default_run_folder_of_a_name_with_signs(tmp_path, monkeypatch):
    """A dataset of the hub is named so: NAME@REVISION:CONFIGURATION."""
    monkeypatch.chdir(tmp_path)
    data = tmp_path / "pets@v1:small.npz"
    np.savez(data, images=np.zeros((40, 8, 8), np.uint8), labels=np.arange(40) % 2, class_names=["a", "b"])
    words = [*TINY, "--steps=1", "--expected_batch_size=20", "--delta=0.01", "--telemetry.samples=0"]
    assert main(["train", *words, f"--data.path={data}"]) == 0
    (run,) = (tmp_path / "runs").iterdir()
    assert run.name.startswith("pets-v1-small-")


def test_another_number_of_examples_is_not_resumed(tmp_path, failure):
    root, run = class_folders(tmp_path / "fruit", FRUIT, size=(8, 8)), tmp_path / "run"
    assert main(["train", *SHORT, f"--data.path={root}", f"--output={run}"]) == 0
    ramp(99, (8, 8)).save(root / "apple" / "more.png")
    assert "13 examples" in failure("train", f"--resume={run}")
    (root / "apple" / "more.png").unlink()
    shutil.move(root / "apple", root / "banana")
    assert "banana" in failure("train", f"--resume={run}")


def test_settings_are_chosen_for_the_data_and_the_users_win(tmp_path, capsys):
    root, run = class_folders(tmp_path / "fruit", FRUIT, size=(20, 16)), tmp_path / "run"
    words = [f"--data.path={root}", "--data.image_size=12", "--data.channels=1", "--steps=1", "--recipe.multiplicity=2"]
    assert main(["train", *words, f"--output={run}"]) == 0
    said = capsys.readouterr().out
    assert "each can be given" in said and "--privacy.delta" in said and "--privacy.steps" not in said
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["recipe"]["patch_size"] == 12 and config["recipe"]["prediction"] == "sample"
    assert config["recipe"]["multiplicity"] == 2 and config["privacy"]["steps"] == 1
    certificate = json.loads((run / "certificate.json").read_text())
    assert certificate["delta"] == config["privacy"]["delta"] < 0.1
    assert f"at delta {certificate['delta']:g}." in said
    again = tmp_path / "again"
    assert main(["train", f"--config={run / 'config.yaml'}", f"--output={again}"]) == 0
    assert "each can be given" not in capsys.readouterr().out  # all are, by the file


def test_patches_tile_images_of_more_than_one_token(tmp_path, capsys):
    root = class_folders(tmp_path / "fruit", FRUIT, size=(20, 16))
    words = [
        f"--data.path={root}",
        "--data.image_size=36",
        "--data.channels=1",
        "--steps=1",
        f"--output={tmp_path / 'r'}",
    ]
    assert main(["train", *SHORT, *words]) == 0
    assert "Patches of 6 x 6 pixels" in " ".join(capsys.readouterr().out.split())
