"""The private score of an evaluation: whom it protects, apart from the certificate's claim, in report and check."""

from __future__ import annotations

import json

import pytest

from dither.cli.main import main
from dither.errors import RunFolderError
from dither.evaluation.private_score import private_score
from dither.report import write_report
from pages import words


def evaluation(released: bool = True, **changed) -> dict:
    """What `dither evaluate --private_score 1` writes, the second time."""
    first = private_score(300, 360, 1.0, 1e-5)
    second = private_score(300, 360, 1.0, 1e-5, [first.noise_multiplier])
    score = {
        "epsilon_spent_on_held_out_images": second.epsilon,
        "delta": 1e-5,
        "noise_multipliers": [first.noise_multiplier, second.noise_multiplier],
    }
    if released:
        score |= {"accuracy": 0.8531, "classifier": "CNN"}
    score = {name: {"value": value, "private": True} for name, value in (score | changed).items()}
    return {"images": {"held_out": {"value": 360, "private": True}}, "private_score": score}


def put(run, content) -> float:
    (run / "evaluation.json").write_text(json.dumps(content))
    return content["private_score"]["epsilon_spent_on_held_out_images"]["value"]


@pytest.mark.parametrize("public", [False, True])
def test_the_report_tells_two_claims_apart(copy, public):
    spent = put(copy, evaluation())
    said = words(write_report(copy, public=public))
    for expected in (
        "0.8531, of CNN trained on generated images covered by its own guarantee",
        f"Spent on them by the scores in this folder epsilon {spent:.6f} at delta 1e-05, by releases with noise",
        "The certificate protects the training examples and says nothing of held-out ones",
        "note A second budget. 2 private scores of held-out images spent epsilon",
        "Only the scores in this folder are counted: those in other folders, of dither evaluate --output or of other",
        "images held out 360 may be published",
    ):
        assert expected in said
    assert "Evaluated on real images" not in said
    put(copy, evaluation(released=False))
    assert "The last evaluation released none" in words(write_report(copy, public=public))


def test_figures_without_noise_are_a_caution(copy):
    put(copy, evaluation() | {"knn": {"value": 0.5, "private": False}})
    assert "caution Evaluated on real images" in words(write_report(copy))


def test_the_check_speaks_of_both(copy, capsys):
    certificate = (copy / "certificate.json").read_bytes()
    put(copy, evaluation())
    assert main(["certificate", "check", str(copy)]) == 0
    out = capsys.readouterr().out
    assert "It holds: epsilon" in out and "2 private scores of held-out images" in out
    assert "no part of the certificate" in out and "Only the scores in this folder are counted" in out
    assert main(["certificate", "check", str(copy / "certificate.json")]) == 0
    assert "held-out" not in capsys.readouterr().out
    assert (copy / "certificate.json").read_bytes() == certificate


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"epsilon_spent_on_held_out_images": 0.9}, "the private score states epsilon 0.9; its releases spend 1."),
        ({"epsilon_spent_on_held_out_images": float("nan")}, "states epsilon nan"),
        ({"noise_multipliers": []}, "damaged"),
        ({"noise_multipliers": [0.0]}, "damaged"),
        ({"noise_multipliers": "many"}, "damaged"),
        ({"delta": None}, "damaged"),
    ],
)
def test_a_score_that_does_not_hold(copy, changed, named, capsys):
    put(copy, evaluation(**changed))
    assert main(["certificate", "check", str(copy)]) == 1
    assert named in capsys.readouterr().err
    if named == "damaged":
        with pytest.raises(RunFolderError, match="damaged"):
            write_report(copy)


def test_an_understated_score_is_not_believed(copy):
    spent = put(copy, evaluation())
    put(copy, evaluation(epsilon_spent_on_held_out_images=0.1))
    said = words(write_report(copy))
    assert f"epsilon {spent:.6f}" in said and "0.1000" not in said


@pytest.mark.parametrize("content", ["{", "[1]"])
def test_an_evaluation_that_is_damaged(content, copy, capsys):
    (copy / "evaluation.json").write_text(content)
    assert main(["certificate", "check", str(copy)]) == 2
    assert "evaluation.json is damaged" in capsys.readouterr().err
