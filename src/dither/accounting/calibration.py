"""One of epsilon, noise and steps from the others."""

from __future__ import annotations

import math
from collections.abc import Callable

from dither.accounting.events import Event, check_delta, check_epsilon, check_mechanism
from dither.accounting.ledger import Ledger
from dither.accounting.loss_distribution import COARSE, FINE, epsilon_of
from dither.errors import BudgetError

_NOISE_RANGE = (0.02, 1e4)
_MOST_STEPS = 10**9


def epsilon_for(sample_rate: float, noise_multiplier: float, steps: int, delta: float) -> float:
    """Epsilon of `steps` steps of DP-SGD (Abadi et al. 2016) on Poisson batches; add or remove one example.

    Args:
        sample_rate: probability that an example is in a batch.
        noise_multiplier: noise standard deviation in units of the clipping bound.
        steps: number of steps.
        delta: in (0, 1).

    Raises:
        ConfigurationError: an argument is outside its range.
    """
    return Ledger([Event(sample_rate, noise_multiplier, steps)]).epsilon(delta)


def noise_multiplier_for(
    epsilon: float, delta: float, sample_rate: float, steps: int, prior: tuple[Event, ...] = ()
) -> float:
    """The least noise, to 0.01%, with which the run spends at most `epsilon`, together with what was released before.

    Args:
        epsilon: of the whole: `prior` and the run.
        delta: in (0, 1), of the whole.
        sample_rate: probability that an example is in a batch.
        steps: number of steps.
        prior: earlier releases from the same examples.

    Raises:
        BudgetError: no noise multiplier between 0.02 and 10,000 does, or `prior` alone spends more.
        ConfigurationError: an argument is outside its range.
    """
    check_epsilon(epsilon)
    check_delta(delta)
    check_mechanism(sample_rate, 1.0, steps)
    if (before := epsilon_of(prior, delta, FINE)) >= epsilon:
        raise BudgetError(
            f"epsilon {epsilon} at delta {delta} is spent before the first step: the releases before it cost "
            f"{before:.4g}.",
            fix="allow a larger epsilon, or give the warm-up a smaller share",
        )

    def spent(noise: float, resolution: float = COARSE) -> float:
        return epsilon_of((*prior, Event(sample_rate, noise, steps)), delta, resolution)

    low, high = _NOISE_RANGE
    trial = 1.0
    while low < high and low * 2 < trial and spent(trial) <= epsilon:
        high, trial = trial, trial / 2
    while trial < high and spent(trial) > epsilon:
        low, trial = trial, min(trial * 2, high)
        if trial >= _NOISE_RANGE[1] and (most := spent(trial)) > epsilon:
            if math.isinf(most):
                raise BudgetError(
                    f"delta {delta} is smaller than the accountant can resolve: with any noise it finds no epsilon.",
                    fix="choose a larger delta; a hundredth of 1 / (number of examples) is small enough for most",
                )
            raise BudgetError(
                f"epsilon {epsilon} at delta {delta} cannot be met by {steps} steps at sample rate {sample_rate}: "
                f"noise multiplier {trial:g} still spends {most:.4g}.",
                fix="allow a larger epsilon or delta, fewer steps, or a smaller expected batch size",
            )
    high = _bisect(low, trial, lambda noise: spent(noise) <= epsilon, 1e-2)
    # The fine discretisation can only lower the epsilon, so the answer lies at most a little below.
    low = high / 1.02
    while low > _NOISE_RANGE[0] and spent(low, FINE) <= epsilon:
        low, high = low / 1.02, low
    below, above = spent(high, FINE), spent(low, FINE)
    share = math.log(above / epsilon) / math.log(above / below) if above > epsilon >= below else 0.0
    guess = low * (high / low) ** share * (1.0 + 5e-5)  # epsilon is nearly a power of the noise on so short a range
    return guess if low < guess < high and spent(guess, FINE) <= epsilon else high


def steps_for(epsilon: float, delta: float, sample_rate: float, noise_multiplier: float) -> int:
    """The largest number of steps that spends at most `epsilon`.

    Raises:
        BudgetError: not one step does.
        ConfigurationError: an argument is outside its range.
    """
    check_epsilon(epsilon)
    check_delta(delta)
    check_mechanism(sample_rate, noise_multiplier, 1)

    def spent(steps: int, resolution: float = COARSE) -> float:
        return epsilon_of((Event(sample_rate, noise_multiplier, steps),), delta, resolution)

    if spent(1, FINE) > epsilon:
        raise BudgetError(
            f"One step at sample rate {sample_rate} and noise multiplier {noise_multiplier} spends epsilon "
            f"{spent(1, FINE):.4g} at delta {delta}; the budget is {epsilon}.",
            fix="raise the noise multiplier or epsilon, or lower the expected batch size",
        )
    # What fits coarsely fits finely, and little more does.
    coarse = _last(1, lambda steps: steps == 1 or spent(steps) <= epsilon)
    return _last(coarse, lambda steps: spent(steps, FINE) <= epsilon)


def _last(start: int, fits: Callable[[int], bool]) -> int:
    """The last number from `start` on that fits; `start` does."""
    most, stride = start, max(1, start // 1000)
    while fits(most + stride):
        most, stride = most + stride, 2 * stride
        if most > _MOST_STEPS:
            return most
    too_many = most + stride
    while too_many - most > 1:
        middle = (most + too_many) // 2
        most, too_many = (middle, too_many) if fits(middle) else (most, middle)
    return most


def _bisect(low: float, high: float, fits: Callable[[float], bool], tolerance: float) -> float:
    """The least value that fits, to a relative tolerance, from above; `high` fits."""
    while high / low > 1.0 + tolerance:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high
