"""What is kept of a model between steps: where the examples lie in its operations, and buffers."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from dither.capture.examples import ExampleAxis
from dither.clipping.buffers import Buffers

_KEPT_LAYOUTS = 4096


@dataclass
class Memory:
    """What is kept between steps for a model: decided example axes and buffers."""

    axes: dict[int, dict[int, ExampleAxis | None]] = field(default_factory=dict)
    uncoupled: set[Any] = field(default_factory=set)
    buffers: Buffers = field(default_factory=Buffers)
    relative: dict[int, dict[int, ExampleAxis]] = field(default_factory=dict)
    proved: dict[Any, int] = field(default_factory=dict)
    plans: dict[Any, Any] = field(default_factory=dict)
    passes: int = 0
    _constants: WeakIdKeyDictionary = field(default_factory=WeakIdKeyDictionary)

    def constants(self) -> list[Tensor]:
        """Tensors computed from constants alone in earlier recordings, that somebody kept and nobody changed."""
        return [tensor for tensor, version in self._constants.items() if tensor._version == version]

    def keep_constants(self, tensors: Iterable[Tensor]) -> None:
        """Remember constants for as long as somebody else keeps them."""
        for tensor in tensors:
            self._constants[tensor] = tensor._version

    def recall(self, signature: Any, sequence: Any) -> dict[int, ExampleAxis | None] | None:
        """The axes kept for a signature.

        After the 2nd, 4th, 8th... pass nothing is recalled, once for each sequence of operations: a gate that was
        closed (a ReLU, a clamp) may hide a dependence from the proof, and be open later.
        """
        self.passes += 1
        if self.due(sequence):
            self.uncoupled.clear()
            return None
        return None if signature is None else self.axes.get(hash(signature))

    def due(self, key: Any) -> bool:
        """Whether the passes doubled since this was asked for the key."""
        if len(self.proved) >= _KEPT_LAYOUTS:
            self.proved.clear()
        before, self.proved[key] = self.proved.get(key, 0), self.passes.bit_length()
        return before < self.passes.bit_length()

    def keep(self, signature: Any, axes: dict[int, ExampleAxis | None]) -> dict[int, ExampleAxis | None]:
        """Keep decided axes; only the signature's hash is kept, and a bounded number of them.

        Returns:
            The axes; where nothing was reached this time (or all is NaN), what was kept before.
        """
        if signature is None:
            return axes
        if len(self.axes) >= _KEPT_LAYOUTS:
            self.axes.clear()
        before = self.axes.get(hash(signature), {})
        kept = {index: before.get(index) if axis is None else axis for index, axis in axes.items()}
        self.axes[hash(signature)] = kept
        return kept

    def plan(self, key: Any, make: Callable[[], Any]) -> Any:
        """The plan kept for a key, or made now."""
        if key not in self.plans:
            if len(self.plans) >= _KEPT_LAYOUTS:
                self.plans.clear()
            self.plans[key] = make()
        return self.plans[key]

    def forget(self, signed: int | None) -> None:
        """Nothing is known any more of a signature, by its hash: its proof failed."""
        self.uncoupled.clear()
        if signed is not None:
            self.axes.pop(signed, None)

    def likely(self, trace: int, batch: int, axes: Mapping[int, ExampleAxis | None]) -> dict[int, ExampleAxis]:
        """Where the examples lay in the same operations with other batch sizes; and remember these axes for that."""
        if len(self.relative) >= _KEPT_LAYOUTS:
            self.relative.clear()
        known = self.relative.setdefault(trace, {})
        before = {index: replace(axis, batch=batch) for index, axis in known.items()}
        if batch > 1:
            known.update({index: axis for index, axis in axes.items() if axis is not None})
        return before


_memories: weakref.WeakKeyDictionary[nn.Module, Memory] = weakref.WeakKeyDictionary()


def memory_of(model: nn.Module) -> Memory:
    """The memory that belongs to a model, as long as the model lives."""
    return _memories.setdefault(model, Memory())


def relative_to(batch: int, tree: Any) -> Any:
    """Operations' options with sizes as multiples of the batch size, so that other batch sizes compare equal."""
    if isinstance(tree, tuple):
        return tuple(relative_to(batch, item) for item in tree)
    if type(tree) is int and batch > 1 and tree and tree % batch == 0:
        return ("batches", str(tree // batch))  # not the number: Python's hashes of -1 and -2 are the same
    return tree


def broadcast_of(batch: int, shape: Sequence[int] | None) -> tuple[str, ...] | None:
    """A shape as far as it says what is broadcast against the examples, for all batch sizes and lengths alike."""
    if shape is None:
        return None
    return tuple("one" if size == 1 else "batch" if size == batch else "more" for size in shape)
