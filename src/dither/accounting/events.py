"""What may be released, and under which parameters."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from dither.errors import ConfigurationError

NEIGHBOURING_RELATION = "add or remove one example"
GRADIENTS, CLASS_MEANS = "gradients", "class means"
CLASS_GAUSSIANS, CLASS_MIXTURES = "class Gaussians", "class mixtures"
RELEASES = (GRADIENTS, CLASS_MEANS, CLASS_GAUSSIANS, CLASS_MIXTURES)
"""What an event may have released."""


@dataclass(frozen=True)
class Event:
    """Runs of the Poisson-sampled Gaussian mechanism with the same parameters.

    Attributes:
        sampling_probability: that an example is in a batch, in (0, 1].
        noise_multiplier: noise standard deviation over L2 sensitivity.
        count: number of runs; for gradients the number of steps.
        release: what was released, one of RELEASES; epsilon does not depend on it.
        private: whether the noise came from fresh entropy; if not, a seed makes it predictable and epsilon is void.
    """

    sampling_probability: float
    noise_multiplier: float
    count: int
    release: str = GRADIENTS
    private: bool = True

    def to_dict(self) -> dict[str, Any]:
        """For JSON: `private` is there only where it is false."""
        return {name: value for name, value in asdict(self).items() if name != "private" or not value}


def check_delta(delta: float) -> None:
    """Refuse a delta outside (0, 1).

    Raises:
        ConfigurationError: it is.
    """
    if not 0.0 < delta < 1.0:
        raise ConfigurationError(f"delta must be above 0 and below 1; it is {delta}.", fix="below 1 / dataset size")


def check_epsilon(epsilon: float) -> None:
    """Refuse an epsilon that is not positive and finite.

    Raises:
        ConfigurationError: it is not.
    """
    if not 0.0 < epsilon < math.inf:
        raise ConfigurationError(f"epsilon must be positive and finite; it is {epsilon}.", fix="1 to 10 is usual")


def check_mechanism(sampling_probability: float, noise_multiplier: float, steps: int) -> None:
    """Refuse parameters that no Poisson-sampled Gaussian mechanism has.

    Raises:
        ConfigurationError: a probability outside (0, 1], noise that is not positive and finite, steps below 1.
    """
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
