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
    assert set(certificate) == set(checking.schema()["properties"])


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
    fields = checking.schema()["properties"] | checking.schema()["$defs"]["event"]["properties"]
    assert [name for name, field in fields.items() if f"| `{name}` | {field['description']} |" not in guide] == []
