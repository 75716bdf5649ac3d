"""A score that may be published: the number of held-out images classified rightly, with Gaussian noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dither.accounting import Event, Ledger, noise_multiplier_for
from dither.noise import GaussianNoise


@dataclass(frozen=True)
class PrivateScore:
    """One release.

    Attributes:
        accuracy: noisy share of rightly classified held-out images; may leave [0, 1].
        noise_multiplier: of this release; its sensitivity is one image.
        epsilon: of all releases from the held-out images so far, this one included.
        delta: of all of them.
    """

    accuracy: float
    noise_multiplier: float
    epsilon: float
    delta: float


def private_score(right: int, count: int, epsilon: float, delta: float, earlier: Sequence[float] = ()) -> PrivateScore:
    """Release an accuracy.

    Guarantee: (epsilon, delta)-differential privacy for one *held-out* example under adding or removing it: the number
    classified rightly moves by at most 1, by a classifier that never saw the held-out images. Their number is taken as
    public. Examples the model was trained on are protected by the run's own certificate, not by this.

    Args:
        right: how many are classified rightly.
        count: how many there are.
        epsilon: of this release alone.
        delta: of all releases.
        earlier: noise multipliers of earlier releases from the same images.

    Raises:
        ConfigurationError: epsilon or delta is out of range.
        BudgetError: no noise meets epsilon.
    """
    noise = noise_multiplier_for(epsilon, delta, 1.0, 1)
    noisy = torch.tensor([float(right)], dtype=torch.float64)
    GaussianNoise().add_([noisy], noise)
    ledger = Ledger(Event(1.0, multiplier, 1) for multiplier in (*earlier, noise))
    return PrivateScore(float(noisy) / count, noise, ledger.epsilon(delta), delta)
