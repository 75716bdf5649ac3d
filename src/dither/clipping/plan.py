"""Which strategy each use's gradient takes, by predicted time under a bound on memory.

hold   form the per-example gradients and keep them: costs the ordinary weight gradient and memory B x P.
ghost  norms from Gram products, then one weighted matrix product: costs T^2 (p + d), no memory.
tile   norms from tiles of the gradient, then the weighted product: costs the gradient twice, no memory.
cross  several uses of one parameter: norms from the Gram products of all their rows, then weighted products.
form   form the gradients of every use and add them per example: several uses, or a tensor computed from parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from dither.capture.uses import ParamUse
from dither.clipping.machine import Rates, rates_of
from dither.errors import MemoryBudgetError, UnknownStrategyError
from dither.rules.rule import Cost

_CALL = 5e-6
"""Seconds that a torch operation takes before it computes anything, of any machine's order."""

_CALLS = {"hold": 4, "form": 5, "ghost": 9, "tile": 8, "cross": 14}
"""How many operations a way takes; decides where there is next to nothing to compute."""

STRATEGIES = ("auto", "hold", "ghost", "tile", "two_pass")


@dataclass(frozen=True)
class PlannedUse:
    """The strategy of one use.

    Attributes:
        parameter: the parameter's name.
        operation: the operation's name.
        strategy: hold, ghost, tile, cross or form.
        held_bytes: memory kept until the sum, bytes.
        seconds: predicted time of norm and sum, the weight gradient itself included; 0 where nothing is predicted.
    """

    parameter: str
    operation: str
    strategy: str
    held_bytes: int
    seconds: float = 0.0


@dataclass(frozen=True)
class Plan:
    """The strategy chosen for every use; print it to read it.

    Attributes:
        uses: in the order they ran.
        rates: the speeds that times are predicted from; None where nothing was planned.
    """

    uses: tuple[PlannedUse, ...]
    rates: Rates | None = None

    @property
    def seconds(self) -> float:
        """Predicted time of all norms and sums."""
        return sum(use.seconds for use in self.uses)

    def __str__(self) -> str:
        """One line a use."""
        width = max((len(use.parameter) for use in self.uses), default=0)
        rows = [
            f"{use.parameter:{width}}  {use.operation:12}  {use.strategy:5}  {use.held_bytes / 2**20:8.2f} MiB held"
            f"  {use.seconds * 1e3:9.3f} ms predicted"
            for use in self.uses
        ]
        return "\n".join(rows)


@dataclass(frozen=True)
class Candidate:
    """A use to be planned.

    Attributes:
        use: its examples decided, or no gradient expected.
        direct: whether the model's parameter itself is used, not a tensor computed from it.
        siblings: how many uses the parameters behind it have, at most.
        crosses: whether every use of the parameter can be multiplied with every other.
    """

    use: ParamUse
    direct: bool
    siblings: int
    crosses: bool


def check_strategy(strategy: str) -> None:
    """Raise UnknownStrategyError unless the strategy is known."""
    if strategy not in STRATEGIES:
        raise UnknownStrategyError(
            f"Unknown strategy {strategy!r}.", fix="choose one of " + ", ".join(repr(s) for s in STRATEGIES)
        )


def make_plan(
    candidates: Sequence[Candidate], strategy: str, memory_budget: float | None, binding: bool, device: torch.device
) -> Plan:
    """Choose for every use.

    Args:
        candidates: the uses, in order.
        strategy: as the user asked for.
        memory_budget: bytes that held gradients may take, unless "hold" asks for them; None for no bound.
        binding: whether more than that is refused, for the user named it; otherwise it is only preferred.
        device: where the gradients are.

    Raises:
        MemoryBudgetError: what has to be formed needs more than a binding budget.
    """
    costs = [_cost(candidate.use) for candidate in candidates]
    rates = rates_of(device, sum(cost.hold for cost in costs)) if strategy == "auto" else rates_of(device, 0.0)
    chosen = [_choose(c, cost, strategy, rates) for c, cost in zip(candidates, costs, strict=True)]
    if strategy != "hold" and memory_budget is not None:
        _fit(chosen, candidates, costs, rates, memory_budget, binding)
    return Plan(
        tuple(
            PlannedUse(
                c.use.name,
                c.use.call.name,
                how,
                int(cost.held_bytes) if how in ("hold", "form") else 0,
                0.0 if c.use.axis is None else predicted(how, cost, rates),
            )
            for how, c, cost in zip(chosen, candidates, costs, strict=True)
        ),
        rates,
    )


def predicted(strategy: str, cost: Cost, rates: Rates) -> float:
    """Seconds of a use's norm and sum."""
    calls = _CALLS[strategy] * _CALL
    weighted = calls + cost.weighted / rates.gemm + cost.row_bytes / rates.memory
    if strategy in ("ghost", "cross"):
        return cost.ghost / rates.small + weighted
    if strategy == "tile":
        return cost.hold / rates.batched + weighted
    # Written, read for the norm, read for the sum.
    return calls + cost.hold / rates.batched + 3.0 * cost.held_bytes / rates.memory


def _cost(use: ParamUse) -> Cost:
    return Cost(0.0, 0.0, 0.0) if use.axis is None else use.rule.cost(use)


def _choose(candidate: Candidate, cost: Cost, strategy: str, rates: Rates) -> str:
    """The fastest way, or the one asked for, whatever memory it takes."""
    use = candidate.use
    if not candidate.direct or use.axis is None:
        return "form"
    if candidate.siblings > 1:
        if strategy == "hold" or not candidate.crosses:
            return "form"
        # Every row of this use meets the rows of all the others.
        across = replace(cost, ghost=cost.ghost * candidate.siblings)
        return "form" if strategy == "auto" and _forms_faster(across, rates) else "cross"
    if use.rule.holds_cheaply or strategy == "hold":
        return "hold"
    if strategy in ("ghost", "tile"):
        return strategy
    if cost.ghost == 0.0:  # one row an example
        return "ghost"
    ways = ("ghost", "tile") if strategy == "two_pass" else ("ghost", "hold", "tile")
    return min(ways, key=lambda way: predicted(way, cost, rates))


def _forms_faster(cost: Cost, rates: Rates) -> bool:
    """Adding to what other uses formed reads and writes it once more."""
    return predicted("form", cost, rates) + cost.held_bytes / rates.memory < predicted("cross", cost, rates)


def _fit(
    chosen: list[str],
    candidates: Sequence[Candidate],
    costs: Sequence[Cost],
    rates: Rates,
    memory_budget: float,
    binding: bool,
) -> None:
    """Give up what is held where that costs the least time for its memory, until the budget is kept."""
    held = {i: cost.held_bytes for i, cost in enumerate(costs) if chosen[i] in ("hold", "form")}
    excess = sum(held.values()) - memory_budget
    if excess <= 0:
        return
    instead = {}
    for i in held:
        if chosen[i] == "hold" and not candidates[i].use.rule.holds_cheaply:
            instead[i] = min(("ghost", "tile"), key=lambda way: predicted(way, costs[i], rates))
        elif chosen[i] == "form" and candidates[i].crosses and candidates[i].siblings > 1:
            instead[i] = "cross"

    def price(i: int) -> float:
        lost = predicted(instead[i], costs[i], rates) - predicted(chosen[i], costs[i], rates)
        return lost / max(held[i], 1.0)

    for i in sorted(instead, key=price):
        if excess <= 0:
            return
        # The uses of one parameter take one way together.
        for j in held:
            if j in instead and candidates[j].use.name == candidates[i].use.name and chosen[j] != instead[j]:
                chosen[j] = instead[j]
                excess -= held[j]
    least = sum(held[i] for i in held if chosen[i] in ("hold", "form"))
    if binding and excess > 0 and any(costs[i].held_bytes and chosen[i] == "form" for i in held):
        formed = sorted({candidates[i].use.name for i in held if chosen[i] == "form"})
        raise MemoryBudgetError(
            f"memory_budget is {memory_budget:,.0f} bytes, and per-example gradients that have to be formed take "
            f"{least:,.0f}: of {', '.join(formed[:3])}{' and others' if len(formed) > 3 else ''}, used several "
            "times or through other tensors.",
            fix="give a larger budget, or fewer examples at once",
        )
