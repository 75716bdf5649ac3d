"""What must be known before a run's claim is relied on, gravest first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from dither.report.checking import words_of_public
from dither.report.contents import Contents
from dither.report.evaluation import has_exposed_figures, score_of
from dither.telemetry.names import EPSILON

WEAK_EPSILON = 10.0
"""Above it a bound says little by itself (Ponomareva et al. 2023, "How to DP-fy ML", tier 3)."""


@dataclass(frozen=True)
class Remark:
    """One thing to know.

    Attributes:
        grade: "danger": there is no guarantee; "caution": it is easily misread; "note": for completeness.
        title: what is the matter.
        text: what follows from it.
    """

    grade: Literal["danger", "caution", "note"]
    title: str
    text: str


def remarks(contents: Contents) -> list[Remark]:
    """All that must be said of this run, gravest first."""
    order = {"danger": 0, "caution": 1, "note": 2}
    certificate = contents.certificate
    found = list(_of_certificate(contents, certificate)) if certificate is not None else [_NO_CERTIFICATE]
    found += _of_values(contents)
    return sorted(found, key=lambda remark: order[remark.grade])


_NO_CERTIFICATE = Remark(
    "danger",
    "No certificate",
    "The run was stopped before its certificate was written, so nothing is claimed here. Resume it: "
    "dither train --resume, with this folder.",
)


def _of_certificate(contents: Contents, certificate: Mapping[str, Any]) -> Iterator[Remark]:
    for reason in certificate["reasons"]:
        yield Remark(
            "danger", "Not private", f"{reason}. No guarantee holds; treat everything here as the data itself."
        )
    for fault in contents.contradictions:
        yield Remark(
            "danger",
            "The claim does not hold",
            f"{fault}. The certificate was changed, or is not of this run: rely on none of its figures.",
        )
    yield from _of_verification(certificate["verification"])
    done, planned = certificate["steps_done"], certificate["steps_planned"]
    if done < planned:
        yield Remark(
            "caution",
            "Unfinished run",
            f"{done:,} of {planned:,} steps are done. Epsilon is what these have spent; the whole plan would spend "
            f"{certificate['planned_epsilon']:.3f}.",
        )
    last = max((step for step, _ in contents.curves.get(EPSILON, ())), default=0)
    if last > done:
        yield Remark(
            "caution",
            "The run went on after the certificate",
            f"The log reaches step {last:,}, the certificate covers {done:,}. It holds for the weights written "
            f"with it, not for state/ or for samples drawn after step {done:,}.",
        )
    if certificate["epsilon"] > WEAK_EPSILON:
        yield Remark(
            "caution",
            "A weak bound",
            f"Above epsilon {WEAK_EPSILON:g} the number by itself promises little; see the table of attacks.",
        )
    if certificate["delta"] >= 1 / certificate["dataset_size"]:
        yield Remark(
            "caution",
            "Delta is large",
            f"Delta {certificate['delta']:g} is not below 1 / {certificate['dataset_size']:,}: publishing one "
            "example at random would meet such a delta.",
        )
    if public := words_of_public(certificate):
        yield Remark(
            "caution",
            "Taken as public",
            f"{' '.join(public)} Nothing here protects the people in it, even if they are in the private data too.",
        )
    if certificate["resumed"]:
        times = "once" if certificate["resumed"] == 1 else f"{certificate['resumed']} times"
        yield Remark(
            "note", "Resumed", f"The run was resumed {times}, with fresh noise each time; the ledger counts all of it."
        )
    yield Remark(
        "note",
        "What no ledger shows",
        "Settings chosen by looking at other runs on the same data spent privacy too, and so did every other "
        "release from this data. The number of examples is taken as public.",
    )


def _of_verification(verification: Mapping[str, Any]) -> Iterator[Remark]:
    status = verification["status"]
    if status == "not exact":
        yield Remark(
            "danger",
            "Gradients were not exact",
            "The comparison with plain autograd failed for this model, so clipping did not bound what it should.",
        )
    elif status != "exact":
        yield Remark(
            "caution",
            "Unverified model",
            f"The comparison of this model's per-example gradients with plain autograd was {status}.",
        )


def _of_values(contents: Contents) -> Iterator[Remark]:
    left = (contents.certificate or {}).get("not_private_values_that_left_the_process", [])
    if left:
        names = ", ".join(str(name).replace("_", " ") for name in left)
        yield Remark(
            "caution",
            "Values that are not private left the process",
            f"{names}: computed from the data without noise, and kept in tensorboard/. The guarantee does not cover "
            "them; do not publish them. Of the verification, the certificate says yes or no.",
        )
    for service in contents.services:
        yield Remark("caution", f"Values were sent to {service}", "Those called non-private/... are not covered.")
    if has_exposed_figures(contents):
        yield Remark(
            "caution",
            "Evaluated on real images",
            "evaluation.json and evaluation/ hold figures and pictures made from training and held-out images without "
            "noise. No guarantee covers them; do not publish them.",
        )
    if score := score_of(contents):
        yield Remark("note", "A second budget", score.words)
