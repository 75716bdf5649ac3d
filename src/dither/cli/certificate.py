"""`dither certificate`: check a certificate, or print the schema that it follows."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentParser

from dither.cli.parsing import Formatter, parse
from dither.errors import CertificateError, ConfigurationError

EXAMPLES = """
examples:
  dither certificate check runs/strict                     the certificate of a run, and its private scores
  dither certificate check certificate.json                one that somebody handed you
  dither certificate schema > certificate.schema.json      its JSON schema

Checked are the form, the figures against each other, and epsilon, computed again from the ledger. That the training did
what the ledger says cannot be seen from a certificate. Private scores of `dither evaluate` are no part of it: of a run
folder, their own epsilon is checked too.

Exit code 1: the claim does not hold; each fault is a line on stderr.
"""

DOES_NOT_HOLD = 1
NEIGHBOURS = "under adding or removing one example"


def certificate_parser() -> ArgumentParser:
    """The parser of `dither certificate`."""
    parser = ArgumentParser(
        prog="dither certificate",
        usage="dither certificate check FILE | dither certificate schema",
        description="Check a privacy certificate.",
        epilog=EXAMPLES,
        formatter_class=Formatter,
        exit_on_error=False,
    )
    parser.add_argument("action", type=Literal["check", "schema"], help="check a file, or print the schema")
    parser.add_argument("file", type=Path | None, nargs="?", default=None, help="certificate.json, or a run folder")
    return parser


def run(words: Sequence[str]) -> int:
    """Run `dither certificate`; returns the exit code."""
    options = parse(certificate_parser(), words)
    from dither.report import checking
    from dither.report.score import faults_of_score, score_claim

    if options.action == "schema":
        print(json.dumps(checking.schema(), indent=2))
        return 0
    if options.file is None:
        raise ConfigurationError("no certificate is named", fix="dither certificate check certificate.json")
    certificate = checking.read_certificate(options.file)
    evaluation = _evaluation(options.file)
    found = [*checking.faults(certificate), *faults_of_score(evaluation)]
    if found:
        print(f"The claim of {options.file} does not hold:", file=sys.stderr)
        for fault in found:
            print(f"  {fault}", file=sys.stderr)
        return DOES_NOT_HOLD
    spent = checking.ledger_of(certificate).epsilon(certificate["delta"])
    print(f"It holds: epsilon {certificate['epsilon']:.6g} at delta {certificate['delta']:g}, {NEIGHBOURS}.")
    print(f"Computed again from the ledger: {spent:.6g}.")
    score = score_claim(evaluation)
    scores = [] if score is None else [score.words]
    for note in [*_notes(certificate), *checking.words_of_public(certificate), *scores]:
        print(f"Note: {note}")
    return 0


def _evaluation(run: Path) -> Mapping[str, Any] | None:
    """What `dither evaluate` left in a run folder; None of a certificate alone."""
    file = run / "evaluation.json"
    if not file.is_file():
        return None
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("it is not a mapping")
        return found
    except (OSError, ValueError) as error:
        raise CertificateError(f"{file} is damaged: {error}", fix="restore it from a copy") from error


def _notes(certificate: Mapping[str, Any]) -> list[str]:
    """What holds, but should be known."""
    notes = []
    done, planned, size, delta = (
        certificate[name] for name in ("steps_done", "steps_planned", "dataset_size", "delta")
    )
    if done != planned:
        notes.append(f"{done} of {planned} steps are done")
    status = certificate["verification"]["status"]
    if status != "exact":
        notes.append(f"the model's gradients are not verified: {status}")
    if delta >= 1 / size:
        notes.append(f"delta {delta:g} is not below 1 / {size}")
    return notes
