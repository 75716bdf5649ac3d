"""The three questions, answered as the accountant answers them."""

from __future__ import annotations

import json

import pytest

from dither.accounting import epsilon_for
from dither.cli.main import main

RUN = ["--dataset_size=2000", "--batch_size=100", "--delta=1e-4"]


@pytest.fixture
def budget(capsys):
    def run(*words: str) -> dict:
        capsys.readouterr()
        assert main(["budget", *RUN, *words, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return run


def test_epsilon_from_noise(budget):
    found = budget("--steps=100", "--noise_multiplier=1.0")
    assert found["computed"] == "epsilon"
    assert found["epsilon"] == epsilon_for(0.05, 1.0, 100, 1e-4)


@pytest.mark.parametrize(("delta", "warned"), [("0.5", True), ("0.0005", True), ("0.0004", False)])
def test_a_delta_that_promises_nothing_is_named(delta, warned, capsys):
    words = ["--steps=100", "--noise_multiplier=1.0", f"--delta={delta}"]
    assert main(["budget", *RUN, *words, "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["delta"] == float(delta)
    assert ("is not below 1 / 2,000 examples" in " ".join(printed.err.split())) is warned


def test_noise_from_epsilon(budget):
    found = budget("--steps=100", "--epsilon=4")
    assert found["computed"] == "noise_multiplier"
    assert 3.9 < found["epsilon"] <= 4
    assert epsilon_for(0.05, found["noise_multiplier"] * 0.98, 100, 1e-4) > 4


def test_steps_from_both(budget):
    found = budget("--noise_multiplier=1.0", "--epsilon=4")
    assert found["computed"] == "steps"
    assert found["epsilon"] <= 4 < epsilon_for(0.05, 1.0, found["steps"] + 1, 1e-4)


def test_table_marks_what_was_computed(capsys):
    assert main(["budget", *RUN, "--steps=100", "--noise_multiplier=1.0"]) == 0
    marked = [line for line in capsys.readouterr().out.splitlines() if "computed" in line]
    assert len(marked) == 1
    assert marked[0].startswith("epsilon")


def test_config_file(tmp_path, capsys):
    file = tmp_path / "budget.yaml"
    file.write_text("dataset_size: 2000\nbatch_size: 100\ndelta: 0.0001\nsteps: 100\nnoise_multiplier: 1.0\n")
    assert main(["budget", f"--config={file}", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["computed"] == "epsilon"


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ([], "dataset_size"),
        (RUN, "0 of epsilon"),
        ([*RUN, "--epsilon=1"], "1 of epsilon"),
        ([*RUN, "--epsilon=1", "--steps=3", "--noise_multiplier=1"], "3 of epsilon"),
        ([*RUN, "--epsilon=-1", "--steps=3"], "epsilon"),
        ([*RUN, "--epsilon=nan", "--steps=3"], "epsilon"),
        ([*RUN, "--epsilon=1", "--steps=0"], "steps"),
        ([*RUN, "--delta=1", "--epsilon=1", "--steps=3"], "delta"),
        ([*RUN, "--batch_size=3000", "--epsilon=1", "--steps=3"], "3000"),
        ([*RUN, "--epsilon=0.1", "--noise_multiplier=0.3"], "0.3"),
        ([*RUN, "--steps=many", "--epsilon=1"], "many"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_option_is_named(words, named, failure):
    assert named in failure("budget", *words)
