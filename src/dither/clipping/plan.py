"""Which strategy each use's gradient takes, by predicted time under a bound on memory.

hold   form the per-example gradients and keep them: costs the ordinary weight gradient and memory B x P.
ghost  norms from Gram products, then one weighted matrix product: costs T^2 (p + d), no memory.
tile   norms from tiles of the gradient, then the weighted product: costs the gradient twice, no memory.
cross  several uses of one parameter: norms from the Gram products of all their rows, then weighted products.
form   form the gradients of every use and add them per example: several uses, or a tensor computed from parameters.

The uses of one parameter take one way together, chosen by their summed cost, and what is held of it counts once. What
is held counts for every parameter, small ones too, so that a budget is kept or refused with the numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from dither.capture.uses import ParamUse
from dither.clipping.expanded import expansion_of
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
        held_bytes: memory kept until the sum, bytes; of several uses of a parameter, at the first.
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
        leaves: names of the parameters behind it.
        crosses: whether its rows can be multiplied with those of other uses.
    """

    use: ParamUse
    direct: bool
    leaves: tuple[str, ...]
    crosses: bool


def check_strategy(strategy: str) -> None:
    """Raise UnknownStrategyError unless the strategy is known."""
    if strategy not in STRATEGIES:
        raise UnknownStrategyError(
            f"Unknown strategy {strategy!r}.", fix="choose one of " + ", ".join(repr(s) for s in STRATEGIES)
        )


class _Group:
    """The uses of one parameter: the ways that they can take together, and what these cost."""

    def __init__(self, members: Sequence[tuple[Candidate, Cost]], held_bytes: float) -> None:
        self.members = members
        reached = any(c.use.axis is not None for c, _ in members)
        self.held_bytes = held_bytes if reached else 0.0
        self.several = len(members) > 1
        self.formed = not all(c.direct and c.use.axis is not None for c, _ in members)
        """Whether nothing else is possible than to form and add."""
        self.crosses = self.several and not self.formed and all(c.crosses for c, _ in members)
        self._roots = sum(math.sqrt(cost.ghost) for _, cost in members)

    @property
    def cheap(self) -> bool:
        """Whether the only use holds small gradients, and knows no other way."""
        return bool(self.members[0][0].use.rule.holds_cheaply)

    def choose(self, strategy: str, rates: Rates) -> str:
        """The fastest way, or the one asked for, whatever memory it takes."""
        if self.formed:
            return "form"
        if self.several:
            if strategy == "hold" or not self.crosses:
                return "form"
            return self._fastest(("cross", "form"), rates) if strategy == "auto" else "cross"
        if self.cheap or strategy == "hold":
            return "hold"
        if strategy in ("ghost", "tile"):
            return strategy
        if self.members[0][1].ghost == 0.0:  # one row an example
            return "ghost"
        return self._fastest(("ghost", "tile") if strategy == "two_pass" else ("ghost", "hold", "tile"), rates)

    def instead(self, way: str, rates: Rates) -> str | None:
        """What needs no held memory, in place of a way that does; None if there is nothing."""
        if way == "hold" and not self.cheap:
            return self._fastest(("ghost", "tile"), rates)
        return "cross" if way == "form" and self.crosses else None

    def seconds(self, way: str, rates: Rates) -> float:
        """Predicted time of all uses."""
        return sum(self.seconds_of(cost, way, rates) for _, cost in self.members)

    def seconds_of(self, cost: Cost, way: str, rates: Rates) -> float:
        """Predicted time of one of the uses."""
        if not self.several:
            return predicted(way, cost, rates)
        if way == "cross":  # every row of this use meets the rows of all the others
            return predicted(way, replace(cost, ghost=math.sqrt(cost.ghost) * self._roots), rates)
        # Adding to what other uses formed reads and writes it once more.
        return predicted(way, cost, rates) + cost.held_bytes / rates.memory

    def _fastest(self, ways: Sequence[str], rates: Rates) -> str:
        return min(ways, key=lambda way: self.seconds(way, rates))


def make_plan(
    candidates: Sequence[Candidate],
    held_bytes: Mapping[str, float],
    strategy: str,
    memory_budget: float | None,
    binding: bool,
    device: torch.device,
) -> Plan:
    """Choose for every use.

    Args:
        candidates: the uses, in order.
        held_bytes: by parameter, what its per-example gradients take.
        strategy: as the user asked for.
        memory_budget: bytes that held gradients may take, unless "hold" asks for them; None for no bound.
        binding: whether more than that is refused, for the user named it; otherwise it is only preferred.
        device: where the gradients are.

    Raises:
        MemoryBudgetError: what has to be held needs more than a binding budget.
    """
    costs = [_cost(candidate.use) for candidate in candidates]
    rates = rates_of(device, sum(cost.hold for cost in costs)) if strategy == "auto" else rates_of(device, 0.0)
    members: dict[str, list[tuple[Candidate, Cost]]] = {}
    for candidate, cost in zip(candidates, costs, strict=True):
        for name in candidate.leaves:
            members.setdefault(name, []).append((candidate, cost))
    groups = {name: _Group(found, held_bytes[name]) for name, found in members.items()}
    ways = {name: group.choose(strategy, rates) for name, group in groups.items()}
    if strategy != "hold" and memory_budget is not None:
        _fit(ways, groups, rates, memory_budget, binding, _made_on_the_way(candidates, held_bytes))
    unsaid = {name: groups[name].held_bytes for name, way in ways.items() if way in _HOLDS}
    planned = []
    for candidate, cost in zip(candidates, costs, strict=True):
        way = ways[candidate.leaves[0]] if candidate.direct and candidate.leaves else "form"
        held = sum(unsaid.pop(name, 0.0) for name in candidate.leaves)
        seconds = 0.0
        if candidate.use.axis is not None:
            group = groups[candidate.leaves[0]] if candidate.direct else None
            seconds = predicted(way, cost, rates) if group is None else group.seconds_of(cost, way, rates)
        planned.append(PlannedUse(candidate.use.name, candidate.use.call.name, way, int(held), seconds))
    return Plan(tuple(planned), rates)


_HOLDS = ("hold", "form")


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


def _made_on_the_way(candidates: Sequence[Candidate], held_bytes: Mapping[str, float]) -> float:
    """Bytes by which the gradients of a computed tensor exceed those of its parameters, which take their place."""
    excess = 0.0
    for candidate in candidates:
        use = candidate.use
        if not candidate.direct and use.axis is not None and expansion_of(use) is None:
            made = float(use.batch * use.parameter.numel() * use.parameter.element_size())
            excess = max(excess, made - sum(held_bytes[name] for name in candidate.leaves))
    return excess


def _fit(
    ways: dict[str, str],
    groups: Mapping[str, _Group],
    rates: Rates,
    memory_budget: float,
    binding: bool,
    on_the_way: float,
) -> None:
    """Give up what is held where that costs the least time for its memory, until the budget is kept."""
    held = {name: groups[name].held_bytes for name, way in ways.items() if way in _HOLDS}
    excess = sum(held.values()) + on_the_way - memory_budget
    if excess <= 0:
        return
    instead = {name: other for name in held if (other := groups[name].instead(ways[name], rates)) is not None}

    def price(name: str) -> float:
        lost = groups[name].seconds(instead[name], rates) - groups[name].seconds(ways[name], rates)
        return lost / max(held[name], 1.0)

    for name in sorted(instead, key=price):
        if excess <= 0:
            return
        ways[name] = instead[name]
        excess -= held.pop(name)
    if binding and excess > 0:
        most = sorted((name for name in held if held[name]), key=lambda name: -held[name])
        names = ", ".join(most[:3]) + (" and others" if len(most) > 3 else "")
        raise MemoryBudgetError(
            f"memory_budget is {memory_budget:,.0f} bytes, and per-example gradients that have to be held take "
            f"{memory_budget + excess:,.0f}: of {names}. There is no other way for biases, scales, operations without "
            "a rule and tensors computed from parameters.",
            fix="give a larger budget, or fewer examples at once",
        )
