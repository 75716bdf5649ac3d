"""The generator: a random graph of operations, its loss, and the model and inputs that its source makes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from properties import attention, convolution, dense, derived, elementwise, normalisation, recurrent, tables
from properties.program import OPERATIONS, Operation, Program, Value, small
from properties.structure import STRUCTURE, activation_in_place, smaller
from properties.wrong import MIXES, WRONG_LOSSES

FAMILIES = (dense, convolution, tables, elementwise, normalisation, attention, recurrent, derived)
LOSSES = (
    "y.square().sum(1) + (y * target).sum(1)",
    "F.mse_loss(y, target.expand_as(y), reduction='none').mean(1)",
    "F.cross_entropy(y, (target[:, 0] > 0).long() % y.shape[1], reduction='none') + y[:, 0] * 0.5",
    "F.smooth_l1_loss(y, target.expand_as(y), reduction='none').sum(1)",
    "(y.clamp(max=2.2).exp() - target * y).sum(1)",
)


def random_program(random: Random, wrong: bool = False) -> Program:
    """A model of up to seven operations on one to five examples.

    Args:
        random: every choice.
        wrong: whether it mixes examples, or returns no per-example loss, on purpose.
    """
    o = Program(random, batch=(3, 2, 4, 5, 1)[random.randrange(5)])
    _first_inputs(o)
    steps = random.randint(1, 6)
    mixed_at = random.randint(1, steps) if wrong and o.chance(2) else 0
    wrong_loss = wrong and not mixed_at
    for step in range(1, steps + 1):
        _step(o)
        if step == mixed_at:
            _mix(o)
    _finish(o)
    o.loss = o.pick(LOSSES)
    if wrong_loss:
        o.wrong = o.pick(tuple(WRONG_LOSSES))
        o.loss = WRONG_LOSSES[o.wrong].format(o.loss)
    _freeze_and_zero(o)
    return o


def _first_inputs(o: Program) -> None:
    d, t = o.width, o.length
    shapes = ((d,), (t, d), (t, d), (d, t), (2, t, d), (d, 3, 4), (2, 2, 2, 3))
    for _ in range(o.pick((1, 1, 2))):
        if o.chance(4):
            o.add_input(*o.pick(((), (t,), (2, t))), high=o.pick((4, o.batch + 1)))
        else:
            o.add_input(*o.pick(shapes))


def _step(o: Program) -> None:
    """One operation with parameters, or without, on a late value; what it makes is live."""
    recent = o.live[-3:]
    value = recent[-1 - min(len(recent) - 1, o.pick((0, 0, 0, 1, 2)))]
    table = STRUCTURE if not value.high and o.chance(3) else OPERATIONS
    found = [operation for operation in table if operation.accepts(value)]
    if value.fresh and o.chance(6):  # straight after a layer, as in nn.ReLU(inplace=True)
        found = [activation_in_place]
    made = _one_of(o, found, value)
    while not small(made):
        made = _one_of(o, [smaller], made)
    o.live.append(made)


def _one_of(o: Program, operations: Sequence[Operation], value: Value) -> Value:
    """Apply one that suits the value."""
    while True:
        chosen = o.pick(operations)
        made = chosen(o, value)
        if made is not None:
            o.names.append(chosen.name)
            o.consumed.add(value.name)
            return made


def _mix(o: Program) -> None:
    value = o.live[-1]
    if value.high:  # ids that nothing was made of yet
        _step(o)
        value = o.live[-1]
    o.live.append(_one_of(o, [mix for mix in MIXES if mix.accepts(value)], value))
    o.wrong = o.names[-1]


def _finish(o: Program) -> None:
    """Join the last value with what nothing used, mostly; then one row of features an example."""
    while o.live[-1].high or not o.owned:
        _step(o)
    parts = [o.live[-1]]
    for value in o.live[:-1]:
        if not value.high and value.name not in o.consumed and o.chance(2):
            parts.append(value)
    flat = [f"{o.relayout(value, 'first')}.flatten(1)" for value in parts]
    o.forward.append(f"return {flat[0]}" if len(flat) == 1 else f"return torch.cat([{', '.join(flat)}], 1)")


def _freeze_and_zero(o: Program) -> None:
    """Sometimes a frozen, a zero and an unused parameter."""
    owned, zeroable = o.owned, o.zeroable
    tied = sum(".weight = " in line for line in o.setup)
    if len(owned) - tied > 1 and o.chance(4):
        o.setup.append(f"{o.pick(owned)}.requires_grad_(False)")
    if zeroable and o.chance(6):
        name = o.pick(zeroable)
        tensors = f"[{name}]" if ".p" in name else f"{name}.parameters()"
        o.setup.append(f"for p in {tensors}: nn.init.zeros_(p)")
    if o.chance(5):
        o.setup.append(o.mode("self.unused = nn.Linear(2, 2)", "self.unused = nn.Parameter(torch.ones(3))"))


# --- from source to tensors ------------------------------------------------------------------------------


@dataclass
class Case:
    """A model made from a program, with inputs.

    Attributes:
        model: the module.
        inputs: examples on axis 0 of each; the last is the target.
        losses: the per-example losses of (model, *inputs).
    """

    model: nn.Module
    inputs: list[Tensor]
    losses: Callable[..., Any]

    def loss_fn(self, keep: list[int] | None = None) -> Callable[[], Tensor]:
        """The losses of some examples (None: of all), with the same dropout masks each time."""
        inputs = self.inputs if keep is None else [x[keep] for x in self.inputs]

        def loss_fn() -> Tensor:
            torch.default_generator.manual_seed(3)
            return self.losses(self.model, *inputs)

        return loss_fn


def make_case(program: Program, dtype: torch.dtype, code: Any = None, batch: int | None = None) -> Case:
    """Run the source: the same numbers, rounded to float32, in every dtype."""
    space: dict[str, Any] = {"torch": torch, "nn": nn, "F": F}
    exec(code or compile(program.source, "<generated model>", "exec"), space)
    torch.default_generator.manual_seed(0)
    model = space["Model"]().to(dtype)
    torch.default_generator.manual_seed(batch or 0)
    inputs = space["make_inputs"](batch or program.batch)
    inputs = [x.to(dtype) if x.is_floating_point() else x for x in inputs]
    return Case(model, inputs, space["losses"])
