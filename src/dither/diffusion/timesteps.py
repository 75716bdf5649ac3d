"""How training draws its timesteps: uniformly, biased to chosen ranges, or log-normally in the noise level.

Every field is a public constant. A distribution is a table of one probability per timestep; draws go through its
inverse, so that they can be stratified whatever the distribution.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from dither.errors import ConfigurationError

Distribution = Literal["uniform", "biased", "log_normal"]
_DISTRIBUTIONS = get_args(Distribution)


@dataclass(frozen=True)
class TimestepDistribution:
    """Which timesteps training draws, and how often.

    Args:
        name: "uniform"; "biased": a mixture of uniform pieces (Ghalebikesabi et al. 2023, "Differentially Private
            Diffusion Models Generate Useful Synthetic Images", sec. 3.2); "log_normal": the logarithm of noise over
            signal is normal (Karras et al. 2022, table 1; with flow matching this is the logit-normal of Esser et al.
            2024, sec. 3.1, whose mean and deviation are 0 and 1).
        mean: of that logarithm; -1.2 as Karras et al.
        std: of that logarithm; 1.2 as Karras et al.
        pieces: for "biased": (first timestep, end, weight) each, the end exclusive; the weights are scaled to sum 1.

    Raises:
        ConfigurationError: an unknown name, or pieces or deviation that cannot work.
    """

    name: Distribution = "uniform"
    mean: float = -1.2
    std: float = 1.2
    pieces: tuple[tuple[int, int, float], ...] = ()

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        if self.name not in _DISTRIBUTIONS:
            raise ConfigurationError(
                f"timestep distribution {self.name!r} is not known", fix=f"choose one of {', '.join(_DISTRIBUTIONS)}"
            )
        if not self.std > 0:
            raise ConfigurationError(f"timestep_std {self.std} is not above 0", fix="1.2 is usual")
        if (self.name == "biased") != bool(self.pieces):
            raise ConfigurationError(
                f"timestep distribution {self.name!r} with pieces {self.pieces}",
                fix="give pieces with 'biased' and only there, e.g. [[0, 200, 0.8], [200, 1000, 0.2]]",
            )
        for first, end, weight in self.pieces:
            if not (0 <= first < end and weight > 0):
                raise ConfigurationError(
                    f"the piece {first}..{end} of weight {weight} cannot be drawn from",
                    fix="a piece is (first timestep, end, weight) with 0 <= first < end and a weight above 0",
                )

    def probabilities(self, log_ratio: Tensor, low: int, high: int) -> Tensor:
        """Return each timestep's probability, (T,) float64.

        Args:
            log_ratio: logarithm of noise over signal at each timestep, ascending, (T,).
            low: lowest timestep drawn.
            high: highest, exclusive; what the distribution gives the others is scaled onto low..high-1.

        Raises:
            ConfigurationError: the distribution draws nothing in that range, or a piece ends beyond T.
        """
        count = len(log_ratio)
        if self.name == "uniform":
            table = torch.ones(count, dtype=torch.float64)
        elif self.name == "log_normal":
            edges = (log_ratio[1:].double() + log_ratio[:-1].double()) / 2
            inner = torch.special.ndtr((edges - self.mean) / self.std)
            table = torch.cat([inner.new_zeros(1), inner, inner.new_ones(1)]).diff()
        else:
            table = torch.zeros(count, dtype=torch.float64)
            for first, end, weight in self.pieces:
                if end > count:
                    raise ConfigurationError(
                        f"the piece {first}..{end} ends beyond the {count} timesteps", fix=f"end it at {count}"
                    )
                table[first:end] += weight / (end - first)
        table[:low] = table[high:] = 0
        if not table.sum() > 0:
            raise ConfigurationError(
                f"the timestep distribution draws nothing in {low}..{high}", fix="widen the range or move the pieces"
            )
        return table / table.sum()


def draw(probabilities: Tensor, position: Tensor) -> Tensor:
    """Return the index at which the cumulated probabilities pass each position in [0, 1), int64.

    Args:
        probabilities: (T,) float64, sum 1.
        position: any shape; uniform positions give draws from the distribution.
    """
    cumulated = probabilities.cumsum(0).to(position.device)
    index = torch.searchsorted(cumulated, position.double().contiguous(), right=True)
    last: Any = probabilities.nonzero().max()
    return index.clamp_(max=int(last))  # rounding may leave the sum just below 1
