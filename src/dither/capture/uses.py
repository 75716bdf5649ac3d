"""What the recorder keeps: operations that used parameters, and each parameter's use in them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dither.capture.examples import Layout
from dither.capture.randomness import DrawnFrom
from dither.errors import ExampleAxisError, SavedInputChangedError


def map_tensors(function: Callable[[Tensor], Any], tree: Any) -> Any:
    """Apply a function to every tensor in nested tuples, lists and dicts."""
    kind = type(tree)
    if kind in _ATOMS:
        return tree
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, (list, tuple)):
        items = [item if type(item) in _ATOMS else map_tensors(function, item) for item in tree]
        return kind(*items) if hasattr(tree, "_fields") else kind(items)
    if kind is dict:
        return {key: map_tensors(function, item) for key, item in tree.items()}
    if isinstance(tree, dict):  # a model's output type, say: its own kind is kept
        mapped = copy.copy(tree)
        for key, item in tree.items():
            mapped[key] = map_tensors(function, item)
        return mapped
    return tree


def tensors_in(*trees: Any) -> list[Tensor]:
    """Every tensor in nested tuples, lists and dicts, in order."""
    found: list[Tensor] = []
    _gather(trees, found)
    return found


def _gather(items: Iterable[Any], found: list[Tensor]) -> None:
    for item in items:
        kind = type(item)
        if kind in _ATOMS:
            continue
        if kind is Tensor or isinstance(item, Tensor):
            found.append(item)
        elif isinstance(item, (list, tuple)):
            _gather(item, found)
        elif isinstance(item, dict):
            _gather(item.values(), found)


_ATOMS = frozenset({int, float, bool, str, type(None), torch.dtype, torch.device})
"""The commonest types that hold no tensor."""


@dataclass(frozen=True)
class Hidden:
    """Stands for a saved input that saved-tensor hooks hold (an activation checkpoint, say) until backward.

    Attributes:
        position: its place among the operation's hidden inputs.
        shape: the input's shape.
    """

    position: int
    shape: torch.Size

    def numel(self) -> int:
        """Number of elements."""
        return self.shape.numel()

    def dim(self) -> int:
        """Number of axes."""
        return len(self.shape)


@dataclass(frozen=True, eq=False)
class OpCall:
    """One output of one recorded operation, the operation's tensors detached.

    An operation with several outputs is several calls that share their arguments.

    Attributes:
        index: position on the tape.
        function: the torch function that was called.
        args: positional arguments, parameters and inputs detached.
        kwargs: keyword arguments, likewise.
        operands: the arguments by the operation's own names, for operations with a rule.
        output_shape: shape of the output.
        output: which of the operation's floating-point outputs it is.
        source: whether no graph leads on from its inputs, so that nothing shows whose rows they are.
        versions: version counters of the saved inputs, to notice a change in place.
        drawn_from: the random states before a random operation without a rule, so that it can be replayed.
        autocast: device type and dtype of the autocast region the operation ran in, if it is to be replayed.
        fixed: positions, among all its tensors, of those that do not vary with the examples, if it is to be replayed.
        hidden: the arguments with `Hidden` in the places of inputs that hooks hold; None if there are none.
    """

    index: int
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    operands: dict[str, Any]
    output_shape: torch.Size
    versions: tuple[tuple[Tensor, int], ...]
    output: int = 0
    source: bool = False
    drawn_from: DrawnFrom | None = None
    autocast: tuple[str, torch.dtype] | None = None
    fixed: frozenset[int] = frozenset()
    hidden: tuple[Any, Any, Any] | None = None

    @property
    def name(self) -> str:
        """The operation's name, for people."""
        return getattr(self.function, "__name__", repr(self.function))

    def release(self) -> None:
        """Let go of the saved inputs: every gradient was formed from them."""
        for name, empty in (("args", ()), ("kwargs", {}), ("operands", {}), ("versions", ())):
            object.__setattr__(self, name, empty)

    def restore(self, tensors: tuple[Any, ...]) -> None:
        """Put the hidden inputs back in their places."""
        self._set(*(_fill(tree, tensors) for tree in self.hidden or ()))

    def conceal(self) -> None:
        """Let go of hidden inputs again: another pass restores them."""
        if self.hidden is not None:
            self._set(*self.hidden)

    def _set(self, args: Any, kwargs: Any, operands: Any) -> None:
        for name, value in (("args", args), ("kwargs", kwargs), ("operands", operands)):
            object.__setattr__(self, name, value)

    def check_unchanged(self) -> None:
        """Raise SavedInputChangedError if a saved input was changed in place since the call."""
        for tensor, version in self.versions:
            if tensor._version != version:
                raise SavedInputChangedError(
                    f"An input of {self.name} (shape {tuple(tensor.shape)}) was changed in place after a parameter was "
                    "used with it, so the per-example gradient cannot be formed from it.",
                    fix="change a copy (x = x + y instead of x += y) or clone the input before the in-place operation",
                )


def _fill(tree: Any, tensors: tuple[Any, ...]) -> Any:
    if isinstance(tree, Hidden):
        return tensors[tree.position]
    if isinstance(tree, (list, tuple)):
        items = [_fill(item, tensors) for item in tree]
        return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)
    if isinstance(tree, dict):
        return {key: _fill(item, tensors) for key, item in tree.items()}
    return tree


@dataclass(frozen=True, eq=False)
class ParamUse:
    """One parameter's use in one operation.

    Attributes:
        call: the operation.
        slot: the operand's name in `call.operands`, or its position among all tensors for the fallback.
        parameter: the parameter, or a tensor computed from parameters alone (its graph leads to them).
        name: the parameter's name in the model; for a computed tensor, how it was made.
        rule: the mathematics of this operation for this operand.
        axis: where the examples lie in the output; None until decided, or if no gradient arrives.
    """

    call: OpCall
    slot: str | int
    parameter: Tensor
    name: str
    rule: Any
    axis: Layout | None = None

    def placed(self, axis: Layout | None) -> ParamUse:
        """The same use with its examples' place."""
        return ParamUse(self.call, self.slot, self.parameter, self.name, self.rule, axis)

    @property
    def examples(self) -> Layout:
        """The decided example axis."""
        if self.axis is None:
            raise ExampleAxisError(
                f"Where the examples lie in the output of {self.call.name} (parameter {self.name}) is undecided.",
                fix="keep one axis, or consecutive rows, of every layer's output for one example",
            )
        return self.axis

    @property
    def batch(self) -> int:
        """B, the number of examples."""
        return self.examples.batch

    def operand(self, name: str) -> Any:
        """A saved operand by name; None if it was not given."""
        return self.call.operands.get(name)


@dataclass
class Tape:
    """Operations in the order they ran, and where output gradients go as they arrive.

    Attributes:
        calls: every output of every recorded operation.
        uses: the parameters' uses in them.
        sink: what gets each output gradient, with its call's index.
        restores: whether hidden inputs are restored before the sink is called.
        followed: shapes of inputs that are followed, by negative index.
    """

    calls: list[OpCall] = field(default_factory=list)
    uses: list[ParamUse] = field(default_factory=list)
    sink: Callable[[int, Tensor], None] | None = None
    restores: bool = False
    followed: dict[int, torch.Size] = field(default_factory=dict)

    @property
    def hides(self) -> bool:
        """Whether some inputs are held by saved-tensor hooks."""
        return any(call.hidden is not None for call in self.calls)

    def deliver(self, call: int, held: Callable[[], tuple[Any, ...]] | None, gradient: Tensor) -> None:
        """Hand an output gradient to whoever listens; called by autograd.

        Args:
            call: the call's index; negative for what is followed without being an operation's output.
            held: gives the call's hidden inputs; None if there are none.
            gradient: the output's gradient.
        """
        if self.sink is None:
            return
        if held is not None:
            # A checkpoint recomputes here, and the recorder must see it; what is not asked for would stay in memory.
            tensors = held()
            if self.restores:
                self.calls[call].restore(tensors)
            del tensors
        with torch._C.DisableTorchFunction():
            self.sink(call, gradient)
