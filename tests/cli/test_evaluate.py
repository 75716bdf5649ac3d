"""`dither evaluate` on a run and on samples: figures, marks, what is refused, what a private score spends."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from dither.cli.main import main
from dither.data import digits


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    """Real training digits, as if they were generated."""
    file = tmp_path_factory.mktemp("samples") / "digits.npz"
    images, labels = digits()[0].tensors
    np.savez(file, images=images.numpy(), labels=labels.numpy())
    return file


def _marks(node):
    if "private" in node:
        return [node["private"]]
    return [mark for part in node.values() for mark in _marks(part)]


def test_a_run(finished_run, tmp_path, capsys):
    run = shutil.copytree(finished_run, tmp_path / "run")
    words = [str(run), "--count=4", "--classifiers", "CNN", "--seed=1"]
    assert main(["evaluate", *words]) == 0
    out = capsys.readouterr().out
    assert "non-private" in out and "frechet distance" in out
    found = json.loads((run / "evaluation.json").read_text())
    assert found["images"]["generated"] == {"value": 40, "private": True}
    assert not any(_marks(found["accuracy_on_held_out_images"])) and not any(_marks(found["nearest_training_image"]))
    with Image.open(run / "evaluation" / "nearest-training-images.png") as picture:
        assert picture.width > picture.height
    assert main(["report", str(run)]) == 0
    assert "nearest training images" in (run / "report.html").read_text()


def test_real_images_as_samples_score_high_and_are_found_in_the_training_data(samples, tmp_path):
    output = tmp_path / "out"
    assert main(["evaluate", str(samples), f"--output={output}", "--classifiers", "CNN", "--private_score=2"]) == 0
    found = json.loads((output / "evaluation.json").read_text())
    assert found["accuracy_on_held_out_images"]["CNN"]["all"]["value"] > 0.93
    assert found["nearest_training_image"]["generated_nearer_than_999_of_1000_held_out"]["value"] == 1437
    assert found["distance_to_held_out_images"]["precision"]["value"] > 0.9
    assert found["private_score"]["accuracy"]["private"] is True
    assert found["private_score"]["epsilon_spent_on_held_out_images"]["value"] <= 2.0


def test_a_second_private_score_counts_the_first(finished_run, tmp_path):
    run = shutil.copytree(finished_run, tmp_path / "run")
    spent = []
    for words in (["--private_score=1"], ["--private_score=1"], []):
        assert main(["evaluate", str(run), "--count=3", "--classifiers", "logistic regression", *words]) == 0
        kept = json.loads((run / "evaluation.json").read_text())["private_score"]
        spent.append(kept["epsilon_spent_on_held_out_images"]["value"])
    assert spent[0] <= 1.0 < spent[1] and spent[2] == spent[1]


def test_what_cannot_be_evaluated(samples, tmp_path, failure):
    assert "--output" in failure("evaluate", samples)
    assert "no classifier" in failure("evaluate", samples, "--output", tmp_path / "a", "--classifiers", "oracle")
    assert "samples are of shape" in failure("evaluate", samples, "--output", tmp_path / "b", "--data.image_size", 12)
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "something").write_text("mine")
    assert "not empty" in failure("evaluate", samples, "--output", tmp_path / "c")
