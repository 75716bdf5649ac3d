"""What an attacker can learn at most: differential privacy as a bound on every test of membership.

An attacker sees all that the run releases and decides whether one example was in the data. The false positive rate is
how often absent examples are called present, the true positive rate how often present ones are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dither.accounting import Ledger

_EPSILONS = 120


@dataclass(frozen=True)
class TradeOff:
    """The privacy profile of a ledger, read as a bound on attackers.

    Attributes:
        profile: pairs (epsilon, delta), each of which the ledger guarantees.
    """

    profile: tuple[tuple[float, float], ...]

    def true_positive_rate(self, false_positive_rate: float) -> float:
        """The most that any attacker reaches at this false positive rate, in [0, 1].

        Each (epsilon, delta) bounds it by e^epsilon alpha + delta and by 1 - e^-epsilon (1 - delta - alpha) (Kairouz,
        Oh and Viswanath 2015; Dong, Roth and Su 2022); the least bound counts.
        """
        alpha = false_positive_rate
        bounds = [1.0]
        for epsilon, delta in self.profile:
            bounds.append(math.exp(min(epsilon, 700.0)) * alpha + delta)
            bounds.append(1.0 - math.exp(-epsilon) * (1.0 - delta - alpha))
        return min(1.0, max(alpha, min(bounds)))

    @property
    def accuracy(self) -> float:
        """The most that any attacker is right, where presence is a coin toss: (1 + delta(0)) / 2."""
        return (1.0 + min(delta for epsilon, delta in self.profile if epsilon == 0.0)) / 2.0


def trade_off(ledger: Ledger, epsilon: float, delta: float) -> TradeOff:
    """The trade-off that a ledger guarantees, from its privacy loss distribution.

    Guarantee: of add or remove one example, as the ledger's.

    Args:
        ledger: what was released.
        epsilon: the ledger's, at `delta`.
        delta: in (0, 1).
    """
    width = epsilon / _EPSILONS
    epsilons: Sequence[float] = [0.0, *(width * (i + 1) for i in range(_EPSILONS))]
    deltas = ledger.deltas(epsilons, delta)
    return TradeOff((*zip(epsilons, deltas, strict=True), (epsilon, delta)))
