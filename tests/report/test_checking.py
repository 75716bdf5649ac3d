"""Certificates of real runs hold; each fault that can be put into one is found and named."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

from dither.accounting import Event, Ledger
from dither.cli.main import main
from dither.report import checking


@pytest.fixture(scope="session")
def certificate(run) -> dict:
    return json.loads((run / "certificate.json").read_text())


def test_the_schema_is_one_and_names_every_field(certificate):
    Draft202012Validator.check_schema(checking.schema())
    assert set(certificate) == set(checking.schema()["required"])
    assert set(certificate) | {"public"} == set(checking.schema()["properties"])


def test_a_real_certificate_holds(run, capsys):
    assert main(["certificate", "check", str(run)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("It holds: epsilon ") and "at delta 0.0001" in out and "Note" not in out


def test_an_unfinished_unverified_one_holds_with_notes(certificate, tmp_path, capsys):
    changed = certificate | {"steps_planned": 30, "noise_multiplier": 9.0, "target_epsilon": None, "delta": 0.01}
    changed |= {"ledger": [{"sampling_probability": certificate["sample_rate"], "noise_multiplier": 9.0, "count": 8}]}
    changed |= {"verification": {"status": "turned off", "exact": None}}
    file = tmp_path / "one.json"
    file.write_text(json.dumps(changed))
    assert main(["certificate", "check", str(file)]) == 0
    out = capsys.readouterr().out
    assert "8 of 30 steps" in out and "turned off" in out and "not below 1 / 1437" in out


def put(*path_and_value):
    *path, value = path_and_value

    def change(certificate):
        node = certificate
        for name in path[:-1]:
            node = node[name]
        node[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (put("epsilon", 1.5), "epsilon is stated as 1.5; the ledger spends"),
        (put("delta", 1e-9), "at delta 1e-09"),
        (put("ledger", 0, "count", 9), "the ledger holds 9 gradient steps"),
        (put("ledger", 0, "noise_multiplier", 50.0), "gradient event 0 has noise_multiplier 50.0"),
        (put("ledger", 0, "sampling_probability", 0.001), "gradient event 0 has sampling_probability"),
        (put("sample_rate", 0.5), "sample_rate is 0.5"),
        (put("planned_epsilon", 0.1), "planned_epsilon is stated as 0.1"),
        (put("target_epsilon", 0.1), "is above target_epsilon 0.1"),
        (put("steps_planned", 3), "is above steps_planned 3"),
        (put("sensitivity", 5.0), "sensitivity is 5.0"),
        (put("private", False), "not private: without a reason"),
        (put("reasons", ["seed=1"]), "beside reasons against it: seed=1"),
        (put("verification", {"status": "not exact", "exact": False}), "found not to be exact"),
        (put("verification", "exact", None), "exact is None"),
        (put("neighbouring_relation", "replace one example"), "neighbouring_relation: "),
        (put("epsilon", "3"), "epsilon: '3' is not of type 'number'"),
        (put("ledger", 0, "kind", "laplace"), "'kind' was unexpected"),
        (put("ledger", 0, "release", "images"), "ledger.0.release"),
        (put("ledger", 0, "count", 0), "ledger.0.count"),
        (put("sampling", "shuffled"), "sampling: "),
        (lambda certificate: certificate.pop("delta"), "'delta' is a required property"),
    ],
)
def test_a_fault_is_named(certificate, change, named, tmp_path, capsys):
    changed = copy.deepcopy(certificate)
    change(changed)
    file = tmp_path / "one.json"
    file.write_text(json.dumps(changed))
    assert main(["certificate", "check", str(file)]) == 1
    assert named in capsys.readouterr().err


def test_a_release_before_the_steps_is_counted(certificate):
    rate, noise = certificate["sample_rate"], certificate["noise_multiplier"]
    means = {"sampling_probability": 1.0, "noise_multiplier": 4.0, "count": 1, "release": "class means"}
    whole = Ledger([Event(1.0, 4.0, 1), Event(rate, noise, 8)]).epsilon(certificate["delta"])
    changed = certificate | {"ledger": [means, *certificate["ledger"]]}
    found = checking.faults(changed)
    assert (
        len(found) == 2 and f"the ledger spends {whole:.6g}" in found[0] and f"the plan spends {whole:.6g}" in found[1]
    )
    assert checking.faults(changed | {"epsilon": whole, "planned_epsilon": whole, "target_epsilon": None}) == []


def public(**changed):
    checkpoint = {"path": "/dit.pt", "sha256": {"dit.pt": "0" * 64}, "taken_as_public": "on the word of A"}
    tuning = {"mode": "lora", "trained_numbers": 5, "all_numbers": 9, "parameters": ["a", "b"]}
    data = {"path": "hf:photos", "sha256": None, "taken_as_public": "on the word of B"}
    data |= {"examples": 1000, "labels": False, "steps": 7}
    return {"public": {"checkpoint": checkpoint, "fine_tuning": tuning, "pretraining": data} | changed}


def test_what_was_taken_as_public_is_said(certificate, tmp_path, capsys):
    file = tmp_path / "one.json"
    file.write_text(json.dumps(certificate | public()))
    assert main(["certificate", "check", str(file)]) == 0
    out = capsys.readouterr().out
    assert "checkpoint /dit.pt is taken as public, on the word of A." in out
    assert "1,000 examples of hf:photos are taken as public, on the word of B: 7 steps" in out


@pytest.mark.parametrize(
    ("own", "said"),
    [(True, "itself, with epsilon 2.5 at delta 1e-05, which this certificate does not add"), (False, "not private")],
)
def test_a_checkpoint_with_a_claim_of_its_own(certificate, own, said):
    holder = public()
    holder["public"]["checkpoint"]["certificate"] = {
        "private": own,
        "epsilon": 2.5,
        "delta": 1e-5,
        "dataset_size": 9,
    }
    assert checking.faults(certificate | holder) == []
    assert said in checking.words_of_public(holder)[0]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (put("public", "fine_tuning", "trained_numbers", 10), "trained_numbers is 10; the model has 9"),
        (put("public", "fine_tuning", "mode", "prompt"), "public.fine_tuning.mode"),
        (put("public", "pretraining", "sha256", "12"), "public.pretraining.sha256"),
        (put("public", "checkpoint", "sha256", {}), "public.checkpoint.sha256"),
        (lambda certificate: certificate["public"].pop("fine_tuning"), "'fine_tuning' is a required property"),
    ],
)
def test_a_fault_in_what_is_public_is_named(certificate, change, named):
    changed = certificate | public()
    change(changed)
    assert [fault for fault in checking.faults(changed) if named in fault]


@pytest.mark.parametrize("text", ["", "[1,", '{"epsilon": NaN}', "\udcff"])
def test_what_is_no_json(text, tmp_path, capsys):
    file = tmp_path / "one.json"
    file.write_bytes(text.encode(errors="surrogateescape"))
    assert main(["certificate", "check", str(file)]) == 2
    assert "cannot be read as a certificate" in capsys.readouterr().err


def test_json_that_is_no_certificate(tmp_path):
    assert checking.faults([]) == ["[] is not of type 'object'"]
    assert main(["certificate", "check", str(tmp_path)]) == 2
    assert main(["certificate", "check"]) == 2


def test_the_schema_is_printed(capsys):
    assert main(["certificate", "schema"]) == 0
    assert json.loads(capsys.readouterr().out) == checking.schema()


def test_the_guide_explains_every_field_in_the_schema_s_words():
    guide = (Path(__file__).parents[2] / "docs" / "certificate.md").read_text()
    parts = [checking.schema(), *checking.schema()["$defs"].values()]
    fields = [field for part in parts for field in part["properties"].items()]
    assert [name for name, field in fields if f"| `{name}` | {field['description']} |" not in guide] == []
