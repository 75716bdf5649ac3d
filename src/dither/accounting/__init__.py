"""Accounting: the ledger of what was released, its epsilon, and calibration.

Neighbouring relation throughout: add or remove one example. Epsilon comes from privacy loss distributions, discretised
pessimistically (`dither.accounting.loss_distribution`): every epsilon here is an upper bound.
"""

from dither.accounting.calibration import epsilon_for, noise_multiplier_for, steps_for
from dither.accounting.events import (
    CLASS_GAUSSIANS,
    CLASS_MEANS,
    CLASS_MIXTURES,
    GRADIENTS,
    NEIGHBOURING_RELATION,
    RELEASES,
    Event,
)
from dither.accounting.ledger import EpsilonCurve, Ledger
from dither.accounting.loss_distribution import accountant_name

__all__ = [
    "CLASS_GAUSSIANS",
    "CLASS_MEANS",
    "CLASS_MIXTURES",
    "GRADIENTS",
    "NEIGHBOURING_RELATION",
    "RELEASES",
    "EpsilonCurve",
    "Event",
    "Ledger",
    "accountant_name",
    "epsilon_for",
    "noise_multiplier_for",
    "steps_for",
]
