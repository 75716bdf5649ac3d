"""The bound on attackers against what is known exactly."""

from __future__ import annotations

import pytest
from scipy.stats import norm

from dither.accounting import Event, Ledger
from dither.report.attack import TradeOff, trade_off


@pytest.mark.parametrize("noise", [0.7, 1.0, 3.0])
def test_one_gaussian_release_has_the_gaussian_trade_off(noise):
    """The best test of N(0, 1) against N(mu, 1) reaches Phi(mu - z(alpha)) (Dong, Roth and Su 2022)."""
    ledger = Ledger([Event(1.0, noise, 1)])
    bound = trade_off(ledger, ledger.epsilon(1e-5), 1e-5)
    for alpha in (0.001, 0.01, 0.1, 0.5, 0.9):
        best = norm.cdf(1 / noise - norm.isf(alpha))
        assert best - 1e-9 <= bound.true_positive_rate(alpha) <= best * 1.01
    assert bound.accuracy == pytest.approx(norm.cdf(0.5 / noise), rel=1e-3)


def test_ends_and_order():
    bound = trade_off(Ledger([Event(0.1, 1.0, 50)]), 3.0, 1e-5)
    rates = [bound.true_positive_rate(alpha / 20) for alpha in range(21)]
    assert rates == sorted(rates) and rates[-1] == 1.0 and rates[0] < 0.01


def test_one_pair_is_the_classical_bound():
    assert TradeOff(((1.0, 0.0),)).true_positive_rate(0.01) == pytest.approx(0.01 * 2.718281828)
