"""Epsilon against other accountants, calibration as an inverse, a curve that never understates."""

from __future__ import annotations

import math

import pytest
from opacus.accountants import PRVAccountant, RDPAccountant

from dither.accounting import EpsilonCurve, Event, Ledger, epsilon_for, noise_multiplier_for, steps_for
from dither.errors import BudgetError, ConfigurationError

SETTINGS = [(0.01, 1.0, 1000, 1e-5), (0.5, 6.0, 250, 1e-4), (0.001, 0.7, 3000, 1e-6)]


@pytest.mark.parametrize("rate, noise, steps, delta", SETTINGS)
def test_other_accountants_agree(rate, noise, steps, delta):
    ours = epsilon_for(rate, noise, steps, delta)
    rdp, prv = RDPAccountant(), PRVAccountant()
    rdp.history = prv.history = [(noise, rate, steps)]
    assert ours <= rdp.get_epsilon(delta) * (1 + 1e-6)
    assert abs(ours - prv.get_epsilon(delta, eps_error=0.005, delta_error=delta / 1000)) <= 0.02 * ours + 0.01


def test_one_gaussian_step_is_the_analytic_value():
    """Balle and Wang 2018, theorem 8."""
    epsilon, noise = epsilon_for(1.0, 2.0, 1, 1e-5), 2.0

    def phi(z):
        return 0.5 * math.erfc(-z / 2**0.5)

    delta = phi(0.5 / noise - epsilon * noise) - math.exp(epsilon) * phi(-0.5 / noise - epsilon * noise)
    assert delta == pytest.approx(1e-5, rel=0.02)


@pytest.mark.parametrize("rate, noise, steps, delta", SETTINGS)
def test_calibration_is_the_inverse(rate, noise, steps, delta):
    epsilon = epsilon_for(rate, noise, steps, delta)
    found = noise_multiplier_for(epsilon, delta, rate, steps)
    assert found == pytest.approx(noise, rel=2e-3)
    assert epsilon_for(rate, found, steps, delta) <= epsilon
    most = steps_for(epsilon, delta, rate, noise)
    assert epsilon_for(rate, noise, most, delta) <= epsilon < epsilon_for(rate, noise, most + 1, delta)
    assert most >= steps


def test_the_ledger_composes_and_survives_json():
    ledger = Ledger()
    for _ in range(10):
        ledger.record(0.1, 1.0)
    for _ in range(5):
        ledger.record(0.2, 2.0)
    assert ledger.events == (Event(0.1, 1.0, 10), Event(0.2, 2.0, 5)) and ledger.steps == 15
    assert Ledger.from_json(ledger.to_json()) == ledger
    assert ledger.epsilon(1e-5) > epsilon_for(0.1, 1.0, 10, 1e-5)
    assert Ledger().epsilon(1e-5) == 0.0


def test_the_curve_never_understates_and_ends_exactly():
    curve = EpsilonCurve(Event(0.1, 1.0, 30), 1e-5)
    shown = [curve.at(i) for i in range(1, 31)]
    assert all(shown[i - 1] >= epsilon_for(0.1, 1.0, i, 1e-5) for i in range(1, 31, 4))
    assert shown == sorted(shown)
    assert shown[-1] == epsilon_for(0.1, 1.0, 30, 1e-5)


def test_a_budget_that_cannot_be_met_says_so_with_the_numbers():
    with pytest.raises(BudgetError, match="1000"):
        noise_multiplier_for(1e-4, 1e-9, 1.0, 1000)
    with pytest.raises(BudgetError, match="larger delta") as refused:
        noise_multiplier_for(1.0, 1e-18, 0.01, 10)
    assert "smaller than the accountant" in refused.value.what
    with pytest.raises(BudgetError, match="One step"):
        steps_for(0.1, 1e-5, 0.5, 0.5)
    for arguments in ((0.0, 1e-5, 0.1, 10), (1.0, 0.0, 0.1, 10), (1.0, 1e-5, 1.5, 10), (1.0, 1e-5, 0.1, 0)):
        with pytest.raises(ConfigurationError):
            noise_multiplier_for(*arguments)
