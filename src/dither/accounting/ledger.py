"""The ledger of what was released, and epsilon along a planned run."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

from dither.accounting.events import GRADIENTS, NEIGHBOURING_RELATION, RELEASES, Event, check_delta, check_mechanism
from dither.accounting.loss_distribution import COARSE, FINE, accountant_of, epsilon_of, is_meaningless
from dither.errors import ConfigurationError, LedgerError

_KNOTS = 50


class Ledger:
    """What a run has released: a list of events, in order, equal neighbours merged.

    Guarantee: a run whose every release is recorded is (epsilon(delta), delta)-differentially private under adding or
    removing one example, for every delta, given noise whose key nobody knows.
    """

    def __init__(self, events: Iterable[Event] = ()) -> None:
        self._events: list[Event] = []
        for event in events:
            self.record(event.sampling_probability, event.noise_multiplier, event.count, event.release, event.private)

    @property
    def events(self) -> tuple[Event, ...]:
        """The events, in order."""
        return tuple(self._events)

    @property
    def steps(self) -> int:
        """Number of gradient steps recorded."""
        return sum(event.count for event in self._events if event.release == GRADIENTS)

    def record(
        self,
        sampling_probability: float,
        noise_multiplier: float,
        count: int = 1,
        release: str = GRADIENTS,
        private: bool = True,
    ) -> None:
        """Add steps, or another release.

        Raises:
            ConfigurationError: a probability outside (0, 1], noise that is not positive, a count below 1, a release
                that no ledger knows.
        """
        check_mechanism(sampling_probability, noise_multiplier, count)
        if release not in RELEASES:
            raise ConfigurationError(f"A ledger knows no release {release!r}.", fix=f"one of {', '.join(RELEASES)}")
        event = Event(sampling_probability, noise_multiplier, count, release, private)
        if self._events and replace(self._events[-1], count=count) == event:
            self._events[-1] = replace(event, count=self._events[-1].count + count)
        else:
            self._events.append(event)

    def epsilon(self, delta: float) -> float:
        """Epsilon at this delta; 0 if nothing was released.

        Raises:
            ConfigurationError: delta is not in (0, 1).
        """
        check_delta(delta)
        return epsilon_of(self.events, delta, FINE)

    def deltas(self, epsilons: Sequence[float], delta: float) -> list[float]:
        """Delta at each of several epsilons: upper bounds, which together trace the privacy profile.

        Args:
            epsilons: at least 0.
            delta: where epsilon is of interest; sets the discretisation only.

        Raises:
            ConfigurationError: delta is not in (0, 1).
        """
        check_delta(delta)
        if not self._events:
            return [0.0] * len(epsilons)
        if is_meaningless(self.events, delta):
            return [1.0] * len(epsilons)
        accountant = accountant_of(self.events, delta, COARSE)
        return [float(accountant.get_delta(epsilon)) for epsilon in epsilons]

    def to_json(self) -> str:
        """The ledger as JSON text; `from_json` gives an equal one."""
        events = [event.to_dict() for event in self._events]
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
        return epsilon_of((*self._prior, self._event), self._delta, FINE)

    def at(self, step: int) -> float:
        """An upper bound on epsilon after this many steps, 0 to count."""
        total = self._event.count
        if step <= 0:
            return epsilon_of(self._prior, self._delta, FINE)
        stride = math.ceil(total / _KNOTS)
        knot = min(total, math.ceil(step / stride) * stride)
        if knot == total:
            return self.planned
        if knot not in self._values:
            events = (*self._prior, replace(self._event, count=knot))
            below = max((value for at, value in self._values.items() if at < knot), default=0.0)
            self._values[knot] = min(max(epsilon_of(events, self._delta, COARSE), below), self.planned)
        return self._values[knot]
