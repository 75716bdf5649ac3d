"""The private score of `dither evaluate`: a claim of its own, about other people than the certificate's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dither.accounting import Event, Ledger

NAME = "private_score"
_SAME = 1e-6  # relative, as for certificates


@dataclass(frozen=True)
class ScoreClaim:
    """What was released from held-out images into one folder.

    Guarantee: (epsilon, delta)-differential privacy of one held-out image, added or removed, for all releases into this
    folder together. What other folders hold of the same images comes on top.

    Attributes:
        accuracy: noisy share of rightly classified images; None where the last evaluation released none.
        classifier: whose accuracy.
        noise_multipliers: of each release; one image moves it by 1 at most.
        stated: epsilon as evaluation.json has it.
        delta: of all releases.
    """

    accuracy: float | None
    classifier: str | None
    noise_multipliers: tuple[float, ...]
    stated: float
    delta: float

    @property
    def epsilon(self) -> float:
        """Of all releases at delta, computed again from their noise."""
        return Ledger(Event(1.0, noise, 1) for noise in self.noise_multipliers).epsilon(self.delta)

    @property
    def words(self) -> str:
        """The claim, what it is no part of, and what it leaves out."""
        count = len(self.noise_multipliers)
        return (
            f"{'One private score' if count == 1 else f'{count} private scores'} of held-out images spent epsilon "
            f"{self.epsilon:.4g} at delta {self.delta:g} on each of them. This is no part of the certificate: that one "
            "protects the training examples and nobody held out; whoever is in both has spent both. Only the scores in "
            "this folder are counted: those in other folders, of dither evaluate --output or of other runs on the same "
            "data, come on top."
        )


def score_claim(evaluation: Mapping[str, Any] | None) -> ScoreClaim | None:
    """The claim in an evaluation.json; None if nothing was released.

    Raises:
        ValueError: its private score is damaged, so that nobody can say what was spent.
    """
    found = (evaluation or {}).get(NAME)
    if not found:
        return None
    try:
        values = {name: figure["value"] for name, figure in found.items()}
        accuracy = values.get("accuracy")
        claim = ScoreClaim(
            accuracy=None if accuracy is None else float(accuracy),
            classifier=values.get("classifier"),
            noise_multipliers=tuple(float(noise) for noise in values["noise_multipliers"]),
            stated=float(values["epsilon_spent_on_held_out_images"]),
            delta=float(values["delta"]),
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"its private score is damaged: {error!r}") from error
    if not claim.noise_multipliers or min(claim.noise_multipliers) <= 0 or not 0 < claim.delta < 1:
        raise ValueError("its private score is damaged: noise multipliers or delta are out of range")
    return claim


def faults_of_score(evaluation: Mapping[str, Any] | None) -> list[str]:
    """What is wrong with the private score of an evaluation.json, in words; empty if its claim holds."""
    try:
        claim = score_claim(evaluation)
    except ValueError as error:
        return [f"evaluation.json: {error}"]
    if claim is not None and not claim.stated >= claim.epsilon * (1 - _SAME):
        return [
            f"evaluation.json: the private score states epsilon {claim.stated:.6g}; its releases spend "
            f"{claim.epsilon:.6g} at delta {claim.delta:g}"
        ]
    return []
