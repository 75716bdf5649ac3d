"""Accounting: the ledger of what was released, its epsilon, and calibration.

Neighbouring relation throughout: add or remove one example. Epsilon comes from privacy loss distributions
(dp_accounting; Koskela et al. 2020; Doroshenko et al. 2022, "Connect the dots"), discretised pessimistically: every
epsilon here is an upper bound, whatever the discretisation.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from typing import Any

from dither.errors import BudgetError, ConfigurationError, LedgerError

NEIGHBOURING_RELATION = "add or remove one example"
GRADIENTS, CLASS_MEANS = "gradients", "class means"
CLASS_GAUSSIANS, CLASS_MIXTURES = "class Gaussians", "class mixtures"
RELEASES = (GRADIENTS, CLASS_MEANS, CLASS_GAUSSIANS, CLASS_MIXTURES)
"""What an event may have released."""
_FINE, _COARSE = 2e-5, 1e-4  # discretisation, relative to the widest privacy loss of one step and to epsilon
_KNOTS = 50
_NOISE_RANGE = (0.02, 1e4)
_MOST_STEPS = 10**9
_MEANINGLESS = 1e4  # epsilon beyond which a simple bound replaces the loss distribution, whose table would not fit


def accountant_name() -> str:
    """The accountant and its version, for certificates."""
    return f"PLD (dp_accounting {version('dp-accounting')})"


@dataclass(frozen=True)
class Event:
    """Runs of the Poisson-sampled Gaussian mechanism with the same parameters.

    Attributes:
        sampling_probability: that an example is in a batch, in (0, 1].
        noise_multiplier: noise standard deviation over L2 sensitivity.
        count: number of runs; for gradients the number of steps.
        release: what was released, one of RELEASES; epsilon does not depend on it.
    """

    sampling_probability: float
    noise_multiplier: float
    count: int
    release: str = GRADIENTS


class Ledger:
    """What a run has released: a list of events, in order, equal neighbours merged.

    Guarantee: a run whose every release is recorded is (epsilon(delta), delta)-differentially private under adding or
    removing one example, for every delta, given noise whose key nobody knows.
    """

    def __init__(self, events: Iterable[Event] = ()) -> None:
        self._events: list[Event] = []
        for event in events:
            self.record(event.sampling_probability, event.noise_multiplier, event.count, event.release)

    @property
    def events(self) -> tuple[Event, ...]:
        """The events, in order."""
        return tuple(self._events)

    @property
    def steps(self) -> int:
        """Number of gradient steps recorded."""
        return sum(event.count for event in self._events if event.release == GRADIENTS)

    def record(
        self, sampling_probability: float, noise_multiplier: float, count: int = 1, release: str = GRADIENTS
    ) -> None:
        """Add steps, or another release.

        Raises:
            ConfigurationError: a probability outside (0, 1], noise that is not positive, a count below 1, a release
                that no ledger knows.
        """
        _check_mechanism(sampling_probability, noise_multiplier, count)
        if release not in RELEASES:
            raise ConfigurationError(f"A ledger knows no release {release!r}.", fix=f"one of {', '.join(RELEASES)}")
        event = Event(sampling_probability, noise_multiplier, count, release)
        if self._events and replace(self._events[-1], count=count) == event:
            self._events[-1] = replace(event, count=self._events[-1].count + count)
        else:
            self._events.append(event)

    def epsilon(self, delta: float) -> float:
        """Epsilon at this delta; 0 if nothing was released.

        Raises:
            ConfigurationError: delta is not in (0, 1).
        """
        _check_delta(delta)
        return _epsilon(self.events, delta, _FINE)

    def deltas(self, epsilons: Sequence[float], delta: float) -> list[float]:
        """Delta at each of several epsilons: upper bounds, which together trace the privacy profile.

        Args:
            epsilons: at least 0.
            delta: where epsilon is of interest; sets the discretisation only.

        Raises:
            ConfigurationError: delta is not in (0, 1).
        """
        _check_delta(delta)
        if not self._events:
            return [0.0] * len(epsilons)
        if _too_large(self.events, delta):
            return [1.0] * len(epsilons)
        accountant = _accountant(self.events, delta, _COARSE)
        return [float(accountant.get_delta(epsilon)) for epsilon in epsilons]

    def to_json(self) -> str:
        """The ledger as JSON text; `from_json` gives an equal one."""
        events = [asdict(event) for event in self._events]
        return json.dumps({"neighbouring_relation": NEIGHBOURING_RELATION, "events": events})

    @classmethod
    def from_json(cls, text: str) -> Ledger:
        """The ledger that `to_json` wrote.

        Raises:
            LedgerError: the text is not a ledger of this neighbouring relation.
        """
        try:
            content = json.loads(text)
            relation = content["neighbouring_relation"]
            ledger = cls(Event(**event) for event in content["events"])
        except (ValueError, KeyError, TypeError) as error:
            raise LedgerError(f"This is not a ledger: {error}", fix="restore the run's state from a copy") from error
        if relation != NEIGHBOURING_RELATION:
            raise LedgerError(
                f"The ledger's neighbouring relation is {relation!r}, not {NEIGHBOURING_RELATION!r}.",
                fix="account the two runs apart; their epsilons do not add up to one statement",
            )
        return ledger

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Ledger) and self._events == other._events

    __hash__ = None  # type: ignore[assignment]  # it grows, so it has none: mypy wants object's method

    def __repr__(self) -> str:
        return f"Ledger({self._events!r})"


class EpsilonCurve:
    """Epsilon after each step of a planned run, cheap enough for a progress bar.

    It has at most fifty knots, evenly spaced and at the last step; between, it shows the next knot, which is an upper
    bound. Inner knots are computed when reached, with a discretisation five times coarser, which
    again can only raise them; the last step's value caps them all. So it never understates and never decreases.

    Args:
        event: the planned run; count is the planned number of steps.
        delta: in (0, 1).
        prior: what was released before the first step.
    """

    def __init__(self, event: Event, delta: float, prior: tuple[Event, ...] = ()) -> None:
        self._event, self._delta, self._prior = event, delta, prior
        self._values: dict[int, float] = {}

    @functools.cached_property
    def planned(self) -> float:
        """Epsilon after the last step."""
        return _epsilon((*self._prior, self._event), self._delta, _FINE)

    def at(self, step: int) -> float:
        """An upper bound on epsilon after this many steps, 0 to count."""
        total = self._event.count
        if step <= 0:
            return _epsilon(self._prior, self._delta, _FINE)
        stride = math.ceil(total / _KNOTS)
        knot = min(total, math.ceil(step / stride) * stride)
        if knot == total:
            return self.planned
        if knot not in self._values:
            events = (*self._prior, replace(self._event, count=knot))
            below = max((value for at, value in self._values.items() if at < knot), default=0.0)
            self._values[knot] = min(max(_epsilon(events, self._delta, _COARSE), below), self.planned)
        return self._values[knot]


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
    _check_epsilon(epsilon)
    _check_delta(delta)
    _check_mechanism(sample_rate, 1.0, steps)
    if (before := _epsilon(prior, delta, _FINE)) >= epsilon:
        raise BudgetError(
            f"epsilon {epsilon} at delta {delta} is spent before the first step: the releases before it cost "
            f"{before:.4g}.",
            fix="allow a larger epsilon, or give the warm-up a smaller share",
        )

    def spent(noise: float, resolution: float = _COARSE) -> float:
        return _epsilon((*prior, Event(sample_rate, noise, steps)), delta, resolution)

    low, high = _NOISE_RANGE
    trial = 1.0
    while low < high and low * 2 < trial and spent(trial) <= epsilon:
        high, trial = trial, trial / 2
    while trial < high and spent(trial) > epsilon:
        low, trial = trial, min(trial * 2, high)
        if trial >= _NOISE_RANGE[1] and spent(trial) > epsilon:
            raise BudgetError(
                f"epsilon {epsilon} at delta {delta} cannot be met by {steps} steps at sample rate {sample_rate}: "
                f"noise multiplier {trial:g} still spends {spent(trial):.4g}.",
                fix="allow a larger epsilon or delta, fewer steps, or a smaller expected batch size",
            )
    high = _bisect(low, trial, lambda noise: spent(noise) <= epsilon, 1e-2)
    # The fine discretisation can only lower the epsilon, so the answer lies at most a little below.
    low = high / 1.02
    while low > _NOISE_RANGE[0] and spent(low, _FINE) <= epsilon:
        low, high = low / 1.02, low
    below, above = spent(high, _FINE), spent(low, _FINE)
    share = math.log(above / epsilon) / math.log(above / below) if above > epsilon >= below else 0.0
    guess = low * (high / low) ** share * (1.0 + 5e-5)  # epsilon is nearly a power of the noise on so short a range
    return guess if low < guess < high and spent(guess, _FINE) <= epsilon else high


def steps_for(epsilon: float, delta: float, sample_rate: float, noise_multiplier: float) -> int:
    """The largest number of steps that spends at most `epsilon`.

    Raises:
        BudgetError: not one step does.
        ConfigurationError: an argument is outside its range.
    """
    _check_epsilon(epsilon)
    _check_delta(delta)
    _check_mechanism(sample_rate, noise_multiplier, 1)

    def spent(steps: int, resolution: float = _COARSE) -> float:
        return _epsilon((Event(sample_rate, noise_multiplier, steps),), delta, resolution)

    if spent(1, _FINE) > epsilon:
        raise BudgetError(
            f"One step at sample rate {sample_rate} and noise multiplier {noise_multiplier} spends epsilon "
            f"{spent(1, _FINE):.4g} at delta {delta}; the budget is {epsilon}.",
            fix="raise the noise multiplier or epsilon, or lower the expected batch size",
        )
    # What fits coarsely fits finely, and little more does.
    coarse = _last(1, lambda steps: steps == 1 or spent(steps) <= epsilon)
    return _last(coarse, lambda steps: spent(steps, _FINE) <= epsilon)


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


@functools.lru_cache(maxsize=256)
def _epsilon(events: tuple[Event, ...], delta: float, resolution: float) -> float:
    """Upper bound on epsilon of the composition; `resolution` sets the discretisation."""
    if not events:
        return 0.0
    if _too_large(events, delta):
        return _without_sampling(events, delta)
    return float(_accountant(events, delta, resolution).get_epsilon(delta))


def _too_large(events: tuple[Event, ...], delta: float) -> bool:
    return min(_without_sampling(events, delta), _central_limit(events, delta)) > _MEANINGLESS


def _accountant(events: tuple[Event, ...], delta: float, resolution: float) -> Any:
    """Google's accountant, with the events composed."""
    from dp_accounting import dp_event
    from dp_accounting.pld import PLDAccountant

    accountant = PLDAccountant(value_discretization_interval=_interval(events, delta, resolution))
    for event in events:
        accountant.compose(_dp_event(dp_event, event), event.count)
    return accountant


def _dp_event(dp_event: Any, event: Event) -> Any:
    gaussian = dp_event.GaussianDpEvent(event.noise_multiplier)
    if event.sampling_probability == 1.0:
        return gaussian
    return dp_event.PoissonSampledDpEvent(event.sampling_probability, gaussian)


def _interval(events: tuple[Event, ...], delta: float, resolution: float) -> float:
    """Width of a bucket: a share of one step's widest loss, or of a rough epsilon where that is larger."""
    widest = max(0.5 / event.noise_multiplier**2 + 10.0 / event.noise_multiplier for event in events)
    return resolution * max(widest, min(_without_sampling(events, delta), _central_limit(events, delta)))


def _without_sampling(events: tuple[Event, ...], delta: float) -> float:
    """Epsilon from zero-concentrated privacy as if every batch were the dataset: a bound (Bun and Steinke 2016)."""
    rho = sum(0.5 * event.count / event.noise_multiplier**2 for event in events)
    return rho + 2.0 * math.sqrt(rho * math.log(1.0 / delta))


def _central_limit(events: tuple[Event, ...], delta: float) -> float:
    """Roughly epsilon (Bu et al. 2020, Gaussian differential privacy); not a bound, sets only the discretisation."""
    squared = sum(
        event.count * event.sampling_probability**2 * math.expm1(min(event.noise_multiplier**-2, 100.0))
        for event in events
    )
    return 0.5 * squared + math.sqrt(2.0 * squared * math.log(1.0 / delta))


def _check_delta(delta: float) -> None:
    if not 0.0 < delta < 1.0:
        raise ConfigurationError(f"delta must be above 0 and below 1; it is {delta}.", fix="below 1 / dataset size")


def _check_epsilon(epsilon: float) -> None:
    if not 0.0 < epsilon < math.inf:
        raise ConfigurationError(f"epsilon must be positive and finite; it is {epsilon}.", fix="1 to 10 is usual")


def _check_mechanism(sampling_probability: float, noise_multiplier: float, steps: int) -> None:
    if not 0.0 < sampling_probability <= 1.0:
        raise ConfigurationError(
            f"The sample rate must be above 0 and at most 1; it is {sampling_probability}.",
            fix="expected_batch_size / dataset size",
        )
    if not 0.0 < noise_multiplier < math.inf:
        raise ConfigurationError(
            f"noise_multiplier must be positive and finite; it is {noise_multiplier}.", fix="0.5 to 10 is usual"
        )
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ConfigurationError(f"steps must be an integer of at least 1; it is {steps!r}.", fix="1000 is a start")
