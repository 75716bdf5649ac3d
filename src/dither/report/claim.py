"""A certificate's claim in numbers that a reader can hold on to."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dither.report.attack import trade_off
from dither.report.chart import Chart, line_chart
from dither.report.checking import ledger_of

FALSE_POSITIVE_RATES = (0.001, 0.01, 0.1)
_CURVE = 60


@dataclass(frozen=True)
class Claim:
    """What follows from a certificate.

    Attributes:
        factor: e^epsilon, by which the chance of any outcome may change; None where it is too large to say anything.
        attacks: pairs (false positive rate, largest true positive rate).
        accuracy: how often a guess is right at most, where presence is a coin toss.
        chart: the whole trade-off.
    """

    factor: float | None
    attacks: tuple[tuple[float, float], ...]
    accuracy: float
    chart: Chart


def claim_of(certificate: Mapping[str, Any] | None) -> Claim | None:
    """The claim; None if there is no certificate, it is not private, or nothing was released yet."""
    if certificate is None or not certificate["private"] or not certificate["ledger"]:
        return None
    epsilon, delta = certificate["epsilon"], certificate["delta"]
    bound = trade_off(ledger_of(certificate), epsilon, delta)
    rates = [0.0, *(10 ** (-4 + 4 * i / _CURVE) for i in range(_CURVE + 1))]
    points = [(100 * rate, 100 * bound.true_positive_rate(rate)) for rate in rates]
    at_one = bound.true_positive_rate(0.01)
    chart = line_chart(
        "trade-off",
        "Most that any attacker can detect, %",
        f"Largest true positive rate by false positive rate: {at_one:.1%} at 1%. The dashed diagonal is guessing.",
        [("guess", [(0.0, 0.0), (100.0, 100.0)]), ("main", points)],
        x_label="absent people wrongly accused, %",
        y_most=100.0,
    )
    attacks = tuple((rate, bound.true_positive_rate(rate)) for rate in FALSE_POSITIVE_RATES)
    return Claim(math.exp(epsilon) if epsilon < 16 else None, attacks, bound.accuracy, chart)
