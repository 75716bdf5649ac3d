"""Which strategy each parameter's gradient takes.

hold   form the per-example gradients and keep them: costs the ordinary weight gradient and memory B x P.
ghost  norms from Gram products, then one weighted matrix product: costs T^2 (p + d), no memory.
tile   norms from tiles of the gradient, then the weighted product: costs the gradient twice, no memory.
A parameter used several times, or through other tensors computed from it, is always formed and added per example.
"""

from __future__ import annotations

from dataclasses import dataclass

from dither.capture.uses import ParamUse
from dither.errors import UnknownStrategyError

STRATEGIES = ("auto", "hold", "ghost", "tile", "two_pass")

_ARITHMETIC = 150e9
"""Floating-point operations a second of a batched matrix product; only the ratio to the next line matters."""

_MEMORY = 20e9
"""Bytes a second read or written, held gradients being passed over twice."""


@dataclass(frozen=True)
class PlannedUse:
    """The strategy of one use.

    Attributes:
        parameter: the parameter's name.
        operation: the operation's name.
        strategy: hold, ghost, tile, or form (several uses, or a computed tensor).
        held_bytes: memory kept until the sum, bytes.
    """

    parameter: str
    operation: str
    strategy: str
    held_bytes: int


@dataclass(frozen=True)
class Plan:
    """The strategy chosen for every use; print it to read it."""

    uses: tuple[PlannedUse, ...]

    def __str__(self) -> str:
        """One line a use."""
        width = max((len(use.parameter) for use in self.uses), default=0)
        rows = [
            f"{use.parameter:{width}}  {use.operation:12}  {use.strategy:5}  {use.held_bytes / 2**20:8.2f} MiB held"
            for use in self.uses
        ]
        return "\n".join(rows)


def check_strategy(strategy: str) -> None:
    """Raise UnknownStrategyError unless the strategy is known."""
    if strategy not in STRATEGIES:
        raise UnknownStrategyError(
            f"Unknown strategy {strategy!r}.", fix="choose one of " + ", ".join(repr(s) for s in STRATEGIES)
        )


def choose(use: ParamUse, strategy: str, memory_left: float) -> str:
    """hold, ghost or tile for a parameter used once.

    Args:
        use: the use, its examples decided.
        strategy: as the user asked for.
        memory_left: bytes that may still be held.
    """
    if use.rule.holds_cheaply:
        return "hold"
    if strategy == "hold":
        return "hold"
    if strategy == "tile":
        return "tile"
    cost = use.rule.cost(use)
    ghost_seconds = cost.ghost / _ARITHMETIC
    if strategy == "two_pass":
        return "ghost" if ghost_seconds <= cost.hold / _ARITHMETIC else "tile"
    if strategy == "ghost":
        return "ghost"
    hold_seconds = 2 * cost.held_bytes / _MEMORY
    if ghost_seconds <= hold_seconds:
        return "ghost"
    if cost.held_bytes <= memory_left:
        return "hold"
    return "ghost" if cost.ghost <= cost.hold else "tile"
