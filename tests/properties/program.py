"""A random model as readable code: what an operation of the generator writes into.

A `Program` is the source of one `nn.Module`, of its inputs and of its per-example losses. An operation takes a value of
the forward and writes the lines that make another one. Every choice comes from one `random.Random`, so that a seed is a
model; hypothesis passes its own `Random` and shrinks the choices.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import TypeVar

Option = TypeVar("Option")
LAYOUTS = ("first", "second", "major", "minor")
_LARGEST = 150


@dataclass(frozen=True)
class Value:
    """A tensor of the forward.

    Attributes:
        name: its name in the source.
        shape: of one example. At least one axis; at least two unless the layout is "first".
        layout: "first" (B, *shape), "second" (shape[0], B, ...), "major" (B * shape[0], ...) with each example's rows
            together, "minor" (shape[0] * B, ...).
        high: 0 for floating-point numbers; otherwise ids below this.
        fresh: nothing needs its memory in backward, so that it may be changed in place.
    """

    name: str
    shape: tuple[int, ...]
    layout: str = "first"
    high: int = 0
    fresh: bool = False

    def __str__(self) -> str:
        return self.name

    @property
    def rank(self) -> int:
        return len(self.shape)

    @property
    def last(self) -> int:
        return self.shape[-1]

    @property
    def sizes(self) -> list[int | None]:
        """The whole tensor's sizes, None for the axis of the examples."""
        if self.layout == "first":
            return [None, *self.shape]
        return [self.shape[0], None, *self.shape[1:]] if self.layout == "second" else [None, *self.shape[1:]]


@dataclass(frozen=True)
class Operation:
    """One way to make a value from another.

    Attributes:
        write: writes the lines; None if the value does not suit it (and then nothing was written).
        ranks: of one example's shape that it takes.
        layouts: that it takes; a value in another one is brought to "first" before.
        ids: whether it takes ids.
    """

    write: Callable[[Program, Value], Value | None]
    ranks: tuple[int, ...]
    layouts: tuple[str, ...]
    ids: bool

    @property
    def name(self) -> str:
        return self.write.__name__

    def accepts(self, value: Value) -> bool:
        return value.rank in self.ranks and bool(value.high) == self.ids

    def __call__(self, program: Program, value: Value) -> Value | None:
        if value.layout not in self.layouts:
            value = program.relayout(value, "first")
        return self.write(program, value)


OPERATIONS: list[Operation] = []


def operation(
    ranks: Sequence[int] = (1, 2, 3, 4), anywhere: bool = False, ids: bool = False, into: list[Operation] = OPERATIONS
) -> Callable[[Callable[[Program, Value], Value | None]], Operation]:
    """Register an operation; `anywhere`: it works on the last axes, wherever the examples are."""

    def register(write: Callable[[Program, Value], Value | None]) -> Operation:
        made = Operation(write, tuple(ranks), LAYOUTS if anywhere else ("first",), ids)
        into.append(made)
        return made

    return register


@dataclass
class Program:
    """The source of a model under construction.

    Attributes:
        random: every choice.
        batch: B, which sizes like to coincide with.
        wrong: how the model mixes examples on purpose; empty if it does not.
        removable: whether it also runs with another number of examples.
        names: of the operations used.
        setup, forward: lines of `__init__` and of `forward`.
        inputs: the model's inputs, and the code that makes each.
        live: values that an operation may go on from.
        consumed: names of values that an operation used.
        loss: the per-example loss, an expression of `y` and `target`.
    """

    random: Random
    batch: int
    wrong: str = ""
    removable: bool = True
    names: list[str] = field(default_factory=list)
    setup: list[str] = field(default_factory=list)
    forward: list[str] = field(default_factory=list)
    inputs: list[tuple[Value, str]] = field(default_factory=list)
    live: list[Value] = field(default_factory=list)
    consumed: set[str] = field(default_factory=set)
    loss: str = ""
    _owned: dict[str, list[str]] = field(default_factory=dict)
    _count: int = 0

    def __post_init__(self) -> None:
        self.width = self.pick((4, 3, 2, self.batch))
        self.length = self.pick((3, self.batch, 2, 4))

    # --- choices ---------------------------------------------------------------------------------

    def pick(self, options: Sequence[Option]) -> Option:
        return options[self.random.randrange(len(options))]

    def chance(self, one_in: int) -> bool:
        return self.random.randrange(one_in) == one_in - 1

    def maybe(self, text: str, one_in: int = 2) -> str:
        return text if self.chance(one_in) else ""

    def size(self) -> int:
        """A number of features: mostly the model's width, so that values join and parameters are shared."""
        return self.pick((self.width, self.width, 2, 3, self.batch))

    def mode(self, *options: str) -> str:
        return self.pick(options)

    # --- what the model owns -----------------------------------------------------------------------

    def _new(self, letter: str) -> str:
        self._count += 1
        return f"{letter}{self._count - 1}"

    def _own(self, letter: str, code: str) -> str:
        """A name for `code`: sometimes one that the model has already."""
        made = self._owned.setdefault(code, [])
        if made and self.chance(2):
            return self.pick(made)
        name = "self." + self._new(letter)
        self.setup.append(f"{name} = {code}")
        made.append(name)
        return name

    def parameter(self, *shape: int, positive: bool = False) -> str:
        """A raw parameter, new or shared."""
        values = f"1 + torch.rand({shape})" if positive else f"torch.randn({shape})"
        return self._own("p", f"nn.Parameter({values})")

    def fill(self, template: str, **sizes: int) -> str:
        """The template with `<d, 2>` replaced by a parameter of that shape, letters being sizes; `<>` is a scalar."""

        def parameter(found: re.Match[str]) -> str:
            letters = [letter for letter in found[1].replace(" ", "").split(",") if letter]
            return self.parameter(*(int(x) if x.isdigit() else sizes[x] for x in letters))

        return re.sub(r"<([\w, ]*)>", parameter, template)

    def module(self, code: str) -> str:
        """A module, new or shared."""
        return self._own("m", code)

    @property
    def owned(self) -> list[str]:
        """Names of what has parameters."""
        return [name for code, names in self._owned.items() if "nn.Dropout" not in code for name in names]

    @property
    def zeroable(self) -> list[str]:
        """What may be zero without a division by zero."""
        plain = ("nn.Parameter(torch", "nn.Linear", "nn.Conv", "nn.Embedding(", "nn.LayerNorm", "nn.GRU", "nn.Multi")
        return [name for code, names in self._owned.items() if code.startswith(plain) for name in names]

    # --- lines -------------------------------------------------------------------------------------

    def add_input(self, *shape: int, high: int = 0) -> Value:
        """An input of the model, examples first."""
        value = Value(self._new("i" if high else "x"), shape, high=high)
        sizes = ", ".join(["B", *map(str, shape)])
        self.inputs.append((value, f"torch.randint({high}, ({sizes},))" if high else f"torch.randn({sizes})"))
        self.live.append(value)
        return value

    def value(self, code: str, shape: Sequence[int], layout: str = "first", fresh: bool = False) -> Value:
        """Write `name = code`."""
        name = self._new("h")
        self.forward.append(f"{name} = {code}")
        return Value(name, tuple(shape), layout, fresh=fresh)

    def overwrite(self, value: Value) -> str:
        """A tensor that may be changed in place: the value itself if nothing else needs it, else a copy."""
        if not value.fresh or value.name in self.consumed:
            return f"({value} * 2)"
        self.live = [other for other in self.live if other.name != value.name]
        return value.name

    def relayout(self, value: Value, layout: str) -> Value:
        """The same values with the examples elsewhere."""
        if value.layout == layout:
            return value
        rows = value.shape[0]
        back = {
            "first": "",
            "second": ".transpose(0, 1)",
            "major": f".unflatten(0, (B, {rows}))",
            "minor": f".unflatten(0, ({rows}, B)).transpose(0, 1)",
        }[value.layout]
        there = {
            "first": "",
            "second": ".transpose(0, 1)",
            "major": ".flatten(0, 1)",
            "minor": ".transpose(0, 1).flatten(0, 1)",
        }[layout]
        return self.value(f"{value}{back}{there}", value.shape, layout)

    def other(self, value: Value, same_shape: bool = True) -> Value:
        """A floating-point value to join with: of the same shape and layout, or any with the examples first."""
        found = [v for v in self.live if not v.high and (v.shape == value.shape or not same_shape)]
        if not found:
            return value
        chosen = self.pick(found)
        self.consumed.add(chosen.name)
        return self.relayout(chosen, value.layout if same_shape else "first")

    def ids(self, shape: Sequence[int], high: int = 4) -> Value:
        """Ids of a shape, an input that exists or a new one."""
        found = [v for v in self.live if v.high == high and v.shape == tuple(shape)]
        return self.pick(found) if found else self.add_input(*shape, high=high)

    # --- the source --------------------------------------------------------------------------------

    @property
    def source(self) -> str:
        """Runs by itself after `import torch, torch.nn as nn, torch.nn.functional as F`."""
        names = ", ".join(value.name for value, _ in self.inputs)
        body = [
            "class Model(nn.Module):",
            "    def __init__(self):",
            "        super().__init__()",
            *("        " + line for line in self.setup),
            "",
            f"    def forward(self, {names}):",
            f"        B = {self.inputs[0][0]}.shape[0]",
            *("        " + line for line in self.forward),
            "",
            "def make_inputs(B):",
            f"    return [{', '.join(code for _, code in self.inputs)}, torch.randn(B, 1)]",
            "",
            "def losses(model, *inputs):",
            "    *inputs, target = inputs",
            "    y = model(*inputs)",
            f"    return {self.loss}",
        ]
        return "\n".join(body)


def small(value: Value) -> bool:
    """Whether one example is small enough to go on from."""
    count = 1
    for size in value.shape:
        count *= size
    return count <= _LARGEST
