"""Epsilon of a composition from its privacy loss distribution, by Google's dp_accounting.

Sources: Koskela et al. 2020; Doroshenko et al. 2022, "Connect the dots". Discretised pessimistically: every epsilon
here is an upper bound, whatever the discretisation.
"""

from __future__ import annotations

import functools
import math
from importlib.metadata import version
from typing import Any

from dither.accounting.events import Event

FINE, COARSE = 2e-5, 1e-4  # discretisation, relative to the widest privacy loss of one step and to epsilon
_MEANINGLESS = 1e4  # epsilon beyond which a simple bound replaces the loss distribution, whose table would not fit


def accountant_name() -> str:
    """The accountant and its version, for certificates."""
    return f"PLD (dp_accounting {version('dp-accounting')})"


@functools.lru_cache(maxsize=256)
def epsilon_of(events: tuple[Event, ...], delta: float, resolution: float) -> float:
    """Upper bound on epsilon of the composition; `resolution` sets the discretisation."""
    if not events:
        return 0.0
    if is_meaningless(events, delta):
        return _without_sampling(events, delta)
    return float(accountant_of(events, delta, resolution).get_epsilon(delta))


def is_meaningless(events: tuple[Event, ...], delta: float) -> bool:
    """Whether epsilon is so large that it promises nothing."""
    return min(_without_sampling(events, delta), _central_limit(events, delta)) > _MEANINGLESS


def accountant_of(events: tuple[Event, ...], delta: float, resolution: float) -> Any:
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
    """Roughly epsilon (Bu et al. 2020, Gaussian differential privacy), not a bound.

    It sets the discretisation, and says what is meaningless.
    """
    squared = sum(
        event.count * event.sampling_probability**2 * math.expm1(min(event.noise_multiplier**-2, 100.0))
        for event in events
    )
    return 0.5 * squared + math.sqrt(2.0 * squared * math.log(1.0 / delta))
