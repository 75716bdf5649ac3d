"""Check a certificate: its form by the schema, its figures against each other, its epsilon from its ledger.

What is checked is the certificate, not the training: that the run did what the ledger says stays its author's word.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from dither.accounting import GRADIENTS, Event, Ledger
from dither.errors import CertificateError

_SAME = 1e-6  # relative: the digits that another version of the accountant may round otherwise


def schema() -> dict[str, Any]:
    """The JSON schema of certificates, draft 2020-12."""
    text = files("dither.report").joinpath("certificate.schema.json").read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text)
    return found


def read_certificate(file: Path) -> Any:
    """The content of a certificate, or of a run folder's.

    Raises:
        CertificateError: it cannot be read, or is not JSON (which knows no NaN and no infinity).
    """
    file = file / "certificate.json" if file.is_dir() else file
    try:
        return json.loads(file.read_text(encoding="utf-8"), parse_constant=_refuse)
    except (OSError, ValueError) as error:
        raise CertificateError(
            f"{file} cannot be read as a certificate: {error}", fix="give certificate.json of a run, or its folder"
        ) from error


def ledger_of(certificate: Mapping[str, Any]) -> Ledger:
    """What a certificate says was released, as its epsilon depends on it."""
    return Ledger(map(_event, certificate["ledger"]))


def faults(certificate: Any) -> list[str]:
    """Everything that is wrong with a certificate, in words; empty if its claim holds."""
    return faults_of_form(certificate) or [*_faults_of_claim(certificate), *_faults_of_figures(certificate)]


def faults_of_form(certificate: Any) -> list[str]:
    """What the schema finds wrong, in words; only where it finds nothing can the rest be read."""
    return list(_faults_of_form(certificate))


def contradictions(certificate: Mapping[str, Any]) -> list[str]:
    """Where a certificate of the right form states what its own figures or its ledger deny, in words."""
    claimed = _faults_of_claim(certificate) if certificate["private"] else ()
    return [*claimed, *_faults_of_figures(certificate)]


def _faults_of_form(certificate: Any) -> Iterator[str]:
    from jsonschema import Draft202012Validator

    for error in sorted(Draft202012Validator(schema()).iter_errors(certificate), key=lambda error: str(error.path)):
        where = ".".join(str(part) for part in error.absolute_path)
        yield f"{where}: {error.message}" if where else error.message


def _faults_of_claim(certificate: Mapping[str, Any]) -> Iterator[str]:
    if not certificate["private"]:
        said = "; ".join(certificate["reasons"]) or "without a reason"
        yield f"it says itself that the run is not private: {said}"
    elif certificate["reasons"]:
        yield f"it claims privacy beside reasons against it: {'; '.join(certificate['reasons'])}"
    if certificate["private"] and not all(event.get("private", True) for event in certificate["ledger"]):
        yield "it claims privacy beside a release whose noise a seed makes predictable"
    verification = certificate["verification"]
    expected = {"exact": True, "not exact": False}.get(verification["status"])
    if verification["exact"] is not expected:
        yield f"verification says {verification['status']!r} and exact is {verification['exact']}"
    if certificate["private"] and expected is False and certificate["steps_done"] > verification.get("first_step", 0):
        yield "it claims privacy for steps whose gradients were found not to be exact"


def _faults_of_figures(certificate: Mapping[str, Any]) -> Iterator[str]:
    yield from _faults_of_plan(certificate)
    yield from _faults_of_public(certificate)
    yield from _faults_of_epsilon(certificate)


def _faults_of_plan(certificate: Mapping[str, Any]) -> Iterator[str]:
    rate = certificate["expected_batch_size"] / certificate["dataset_size"]
    if not math.isclose(certificate["sample_rate"], rate, rel_tol=_SAME):
        yield f"sample_rate is {certificate['sample_rate']}; expected_batch_size / dataset_size is {rate}"
    if certificate["clipping"] == "flat" and certificate["sensitivity"] != certificate["max_grad_norm"]:
        yield f"sensitivity is {certificate['sensitivity']}; under flat clipping it is {certificate['max_grad_norm']}"
    steps = [event for event in certificate["ledger"] if event.get("release", GRADIENTS) == GRADIENTS]
    taken = sum(event["count"] for event in steps)
    if taken != certificate["steps_done"]:
        yield f"steps_done is {certificate['steps_done']}; the ledger holds {taken} gradient steps"
    if certificate["steps_done"] > certificate["steps_planned"]:
        yield f"steps_done {certificate['steps_done']} is above steps_planned {certificate['steps_planned']}"
    for index, event in enumerate(steps):
        for name, field in (("sampling_probability", "sample_rate"), ("noise_multiplier", "noise_multiplier")):
            if not math.isclose(event[name], certificate[field], rel_tol=_SAME):
                yield f"gradient event {index} has {name} {event[name]}; {field} is {certificate[field]}"


def _faults_of_public(certificate: Mapping[str, Any]) -> Iterator[str]:
    tuning = certificate.get("public", {}).get("fine_tuning")
    if tuning and tuning["trained_numbers"] > tuning["all_numbers"]:
        yield f"trained_numbers is {tuning['trained_numbers']}; the model has {tuning['all_numbers']} numbers"


def _faults_of_epsilon(certificate: Mapping[str, Any]) -> Iterator[str]:
    delta, stated = certificate["delta"], certificate["epsilon"]
    spent = ledger_of(certificate).epsilon(delta)
    if stated < spent * (1 - _SAME):
        yield f"epsilon is stated as {stated:.6g}; the ledger spends {spent:.6g} at delta {delta:g}"
    plan = [_event(event) for event in certificate["ledger"] if event.get("release", GRADIENTS) != GRADIENTS]
    plan.append(Event(certificate["sample_rate"], certificate["noise_multiplier"], certificate["steps_planned"]))
    planned, stated_plan = Ledger(plan).epsilon(delta), certificate["planned_epsilon"]
    if stated_plan < planned * (1 - _SAME):
        yield f"planned_epsilon is stated as {stated_plan:.6g}; the plan spends {planned:.6g} at delta {delta:g}"
    target = certificate["target_epsilon"]
    if target is not None and stated_plan > target * (1 + _SAME):
        yield f"planned_epsilon {stated_plan:.6g} is above target_epsilon {target:g}"


def words_of_public(certificate: Mapping[str, Any]) -> list[str]:
    """Each thing that a certificate takes as public, in a sentence that says on what its claim then rests."""
    public = certificate.get("public", {})
    found = []
    if checkpoint := public.get("checkpoint"):
        words = f"The checkpoint {checkpoint['path']} is taken as public, {checkpoint['taken_as_public']}"
        own = checkpoint.get("certificate")
        if own and own["private"]:
            claim = f"epsilon {own['epsilon']:.6g} at delta {own['delta']:g}"
            words += f"; it was trained privately itself, with {claim}, which this certificate does not add"
        elif own:
            words += "; its own certificate says that it is not private"
        found.append(words + ".")
    if data := public.get("pretraining"):
        found.append(
            f"The {data['examples']:,} examples of {data['path']} are taken as public, {data['taken_as_public']}: "
            f"{data['steps']:,} steps on them had no noise."
        )
    return found


def _event(event: Mapping[str, Any]) -> Event:
    return Event(event["sampling_probability"], event["noise_multiplier"], event["count"])


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not a JSON number")
