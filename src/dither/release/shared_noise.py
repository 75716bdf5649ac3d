"""The parts of one release and its noise: each part has some of its own, and their precisions add to the whole's."""

from __future__ import annotations

import math

from torch import Tensor

from dither.errors import LedgerError
from dither.noise import GaussianNoise

ROUNDS = 3  # of k-means
# What each part of a mixture's release has of its precision, 1 / noise_multiplier^2; all together have 1.
MIDDLE_SHARE, DIRECTIONS_SHARE, CLASSES_SHARE, ROUND_SHARE = 1 / 32, 1 / 32, 1 / 32, 1 / 8
COVARIANCES_SHARE = 1 - MIDDLE_SHARE - DIRECTIONS_SHARE - CLASSES_SHARE - ROUNDS * ROUND_SHARE


class SharedNoise:
    """Gives each part of a release its share of the precision, and noise of its own.

    Guarantee: each part is a Gaussian mechanism under adding or removing one example, if its sensitivity bounds what
    one example moves it by; on the same data and earlier parts they compose to one of `noise_multiplier` (Dong et al.
    2019, "Gaussian Differential Privacy", corollary 3.3). A seed voids that.

    Args:
        noise_multiplier: of the whole release.
        seed: None for fresh entropy.
    """

    def __init__(self, noise_multiplier: float, seed: int | None) -> None:
        self._multiplier, self._source = noise_multiplier, GaussianNoise(seed)
        self._parts, self._shared = 0, 0.0

    def multiplier(self, share: float) -> float:
        """The noise multiplier of a part."""
        return self._multiplier / math.sqrt(share)

    def added(self, sums: Tensor, sensitivity: float, share: float) -> Tensor:
        """The sums, in place, with noise.

        Args:
            sums: of a part.
            sensitivity: what one example moves them by at most, as a Euclidean norm.
            share: of the release's precision.

        Raises:
            LedgerError: the shares add to more than 1.
        """
        self._shared += share
        if self._shared > 1 + 1e-9:
            raise LedgerError("the parts of a release cost more than the whole.", fix="their shares must add to 1")
        self._source.add_([sums], self.multiplier(share) * sensitivity, step=self._parts)
        self._parts += 1
        return sums
