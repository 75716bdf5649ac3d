"""One recorded forward of a module: its batch size, its marked outputs, its examples' places.

The user computes the loss and calls backward, so nothing is decided here: that is for `deciding.py`, just before the
backward pass, when the graph from the loss to the recorded operations is complete.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from dither.capture.examples import ExampleAxis, candidates
from dither.capture.places import alias
from dither.capture.recorder import Recorder
from dither.capture.uses import OpCall, ParamUse, map_tensors
from dither.clipping.memory import memory_of
from dither.clipping.recording import Recorded, check_buffers, constants_of
from dither.errors import CoupledExamplesError
from dither.opacus.graph import mark
from dither.rules import table

_KEEPS_AXES = {F.linear, F.embedding}
"""Operations whose output has the data operand's axes, but for the last one."""

_CONVOLUTIONS = {F.conv1d, F.conv2d, F.conv3d}
"""Operations whose examples lie on the first axis."""


def tensors_of(tree: Any, depth: int = 8) -> Iterator[Tensor]:
    """Every tensor in nested containers, mappings and plain objects, in order."""
    if isinstance(tree, Tensor):
        yield tree
    elif depth == 0 or isinstance(tree, (str, bytes, nn.Module, type)):
        return
    elif isinstance(tree, Mapping):
        for item in tree.values():
            yield from tensors_of(item, depth - 1)
    elif isinstance(tree, (list, tuple, set, frozenset)):
        for item in tree:
            yield from tensors_of(item, depth - 1)
    elif is_dataclass(tree):
        for field in fields(tree):
            yield from tensors_of(getattr(tree, field.name, None), depth - 1)
    elif hasattr(tree, "__dict__") and not callable(tree):
        yield from tensors_of(vars(tree), depth - 1)


@dataclass(frozen=True)
class _Slice:
    """A tensor that is a part of another with as many axes, which is alive.

    Attributes:
        memory: address of the whole's memory.
        offset: where in it the part begins.
        shape: of the part.
        stride: of the part.
        whole: shape of the whole.
    """

    memory: int
    offset: int
    shape: torch.Size
    stride: tuple[int, ...]
    whole: torch.Size

    @staticmethod
    def of(tensor: Tensor) -> _Slice | None:
        """The tensor as a part of another, if it is one."""
        whole = tensor._base if type(tensor) is Tensor and tensor.layout == torch.strided else None
        if whole is None or whole.dim() != tensor.dim():
            return None
        memory, offset = tensor.untyped_storage().data_ptr(), int(tensor.storage_offset())
        return _Slice(memory, offset, tensor.shape, tensor.stride(), whole.shape)

    def is_apart_from(self, other: _Slice, axis: int) -> bool:
        """Whether both are ranges on one axis of the same tensor, one behind the other."""
        rest = [a for a in range(len(self.shape)) if a != axis]
        same = (self.memory, self.shape, self.stride) == (other.memory, other.shape, other.stride)
        ranges = same and all(self.shape[a] == self.whole[a] for a in rest)
        return ranges and abs(self.offset - other.offset) >= self.shape[axis] * self.stride[axis] > 0


class ModuleRecording(Recorded):
    """A forward pass of a module under the recorder.

    Args:
        model: the module whose parameters are recorded.
        parameters: those parameters by name.
        batch_first: whether inputs and outputs have the examples on axis 0, or on axis 1 from two axes on.
        free: inputs, by their place among all, that had another size than the batch once: not one row per example.
    """

    def __init__(
        self, model: nn.Module, parameters: dict[str, Tensor], batch_first: bool, free: set[int] | None = None
    ) -> None:
        super().__init__(model, parameters)
        self._model = model
        self._batch_first = batch_first
        self.free: set[int] = set() if free is None else free
        self.known: dict[int, ExampleAxis] = {}
        self._given: list[Tensor] = []
        self._slices: list[_Slice | None] = []
        self.followed: dict[int, GradientEdge] = {}
        self.input_sizes: set[int] = set()
        self.output_sizes: set[int] = set()
        self.kept: list[Any] = []  # parameters in the care of a registered sampler
        self.published = False  # whether it was sent back
        self.published_in: Any = None  # the batch of .grad_sample that it was sent back into
        self.overtaken = False  # whether, before it was, another forward was
        self.keeps_inputs = True
        self.hooks: Callable[[], Any] = lambda: None
        self.late: list[tuple[int, Tensor]] = []
        self.end_pass()
        self.recorder = Recorder(
            parameters,
            [p for p in constants_of(model) if id(p) not in {id(q) for q in parameters.values()}],
            table,
            lambda output, call: mark(output, self, call),
            constants=memory_of(model).constants(),
        )
        self.anchor = self.recorder.anchor

    def start(self, inputs: Any) -> Any:
        """Start recording, and return what the module's forward is to be given."""
        self._slices = [_Slice.of(tensor) for tensor in tensors_of(inputs)]
        inputs = self._follow(inputs)
        self._buffers = dict(self._model.named_buffers())
        self.recorder.__enter__()
        return inputs

    def end_pass(self) -> None:
        """Forget what holds on to the graph, which holds on to this recording: no collector sees that circle."""
        self.decide_again: Callable[[], Any] = lambda: None
        self.receive: Callable[[ParamUse, Tensor], bool] = lambda use, gradient: False
        self.edges: Mapping[int, GradientEdge] = {}
        self.late.clear()

    def nodes(self) -> Mapping[int, Any]:
        """As the pass under way reaches them."""
        return {call: edge.node for call, edge in self.edges.items()}

    def _follow(self, inputs: Any) -> Any:
        """The inputs, floating-point tensors with a place in the graph, so that a proof sees what mixes them."""
        positions = {id(tensor): position for position, tensor in enumerate(tensors_of(inputs))}

        def followed(tensor: Tensor) -> Tensor:
            position = positions.get(id(tensor))
            if tensor.requires_grad or not tensor.is_floating_point() or type(tensor) is not Tensor or position is None:
                return tensor
            tracked = alias(tensor, self.anchor, partial(self.recorder.tape.deliver, -1 - position, None))
            self.followed[-1 - position] = get_gradient_edge(tracked)
            return tracked

        return map_tensors(followed, inputs)

    def finish(self, inputs: Any, output: Any) -> None:
        """Stop recording; find the batch size and mark the module's outputs.

        Args:
            inputs: the arguments of the forward.
            output: what it returned, of any structure.
        """
        self.recorder.__exit__(None, None, None)
        self.recorder.kinds.check_state()
        check_buffers(self._buffers, self._model, self.recorder)
        self.take(self.recorder)
        del self.recorder, self._buffers, self._model
        given = list(tensors_of(inputs))
        returned = [t for t in tensors_of(output) if t.requires_grad and not any(t is other for other in given)]
        self.batch = self._batch_size(given, returned)
        self._given = given
        for tensor in returned:
            if tensor.grad_fn is not None and self._is_batched(tensor):
                mark(tensor, self)

    def place_inputs(self) -> None:
        """Where the examples lie in the inputs, and in operations on them, now that the batch size is certain."""
        given, self._given, self._slices = self._given, [], []
        self.known |= self._anchored(given)
        for position, tensor in enumerate(given):
            if not self._is_batched(tensor):
                self.free.add(position)
            index = -1 - position
            if position in self.free:
                self.followed.pop(index, None)
            elif index in self.followed:
                self.known[index] = ExampleAxis(self.axis_of(tensor.dim()), 1, self.batch, 1)

    def takes_other_rows(self, other: ModuleRecording) -> bool:
        """Whether both forwards took all their examples from the same tensors, and different rows of them."""
        if not len(self._given) == len(self._slices) == len(other._slices) == len(other._given):
            return False
        pairs = list(zip(self._given, self._slices, other._slices, strict=True))
        found = [
            mine is not None and theirs is not None and mine.is_apart_from(theirs, self.axis_of(tensor.dim()))
            for tensor, mine, theirs in pairs
            if self._is_batched(tensor)
        ]
        return bool(found) and all(found)

    def deliver_late(self, late: Sequence[tuple[int, Tensor]]) -> None:
        """Hand over output gradients whose places are decided only now."""
        uses = self.uses_by_call()
        for call, gradient in late:
            if uses[call][0].axis is None and not bool(torch.isfinite(gradient).all()):
                # The model has diverged, and NaN everywhere hides what depends on what: as with other batch sizes.
                likely = self.likely.get(call)
                fits = likely is not None and likely in candidates(gradient.shape, self.batch)
                uses[call] = [replace(use, axis=likely if fits else None) for use in uses[call]]
            for use in uses[call]:
                self.receive(use, gradient)

    def explained(self, error: CoupledExamplesError) -> CoupledExamplesError:
        """The same refusal; where inputs and outputs differ in their batch axis, with what that may mean."""
        sizes = sorted(self.input_sizes | self.output_sizes)
        if len(sizes) < 2:
            return error
        axis = 0 if self._batch_first else 1
        return CoupledExamplesError(
            f"{error.what}\n  Inputs and outputs of the module have sizes {sizes} on axis {axis}, where "
            f"batch_first={self._batch_first} says that the examples lie; {self.batch} was taken.",
            fix=f"if the module takes time-first input, wrap it with batch_first={not self._batch_first}; otherwise "
            + error.fix,
        )

    def axis_of(self, dimensions: int) -> int:
        """Where an input or output of so many axes has its examples, as the user declared."""
        return 0 if self._batch_first or dimensions < 2 else 1

    def _is_batched(self, tensor: Tensor) -> bool:
        axis = self.axis_of(tensor.dim())
        return tensor.dim() > axis and tensor.shape[axis] == self.batch

    def _batch_size(self, given: Sequence[Tensor], returned: Sequence[Tensor]) -> int:
        """The size of the batch axis: of an input and an output; else the inputs' commonest; else an output's."""
        sizes, outputs = (
            [t.shape[self.axis_of(t.dim())] for t in tensors if t.dim() > self.axis_of(t.dim())]
            for tensors in (given, returned)
        )
        self.input_sizes, self.output_sizes = set(map(int, sizes)), set(map(int, outputs))
        for size in sizes:
            if size in outputs:
                return int(size)
        commonest = Counter(sizes or outputs).most_common(1)
        return int(commonest[0][0]) if commonest else 1

    def _anchored(self, given: Sequence[Tensor]) -> dict[int, ExampleAxis]:
        """Layouts of the operations whose operand is an input itself, or a view of it."""
        known = {}
        for call in self.tape.calls:
            axes: set[int] = set()
            if call.function in _CONVOLUTIONS and call.operands:
                axes = {0} if len(call.output_shape) == call.operands["weight"].dim() else set()
            elif call.function in _KEEPS_AXES:
                axes = {axis for t in given if self._is_batched(t) for axis in self._axes_in_view(call, t)}
            axes = {axis for axis in axes if self._fits(call, axis)}
            if len(axes) == 1:
                known[call.index] = ExampleAxis(axes.pop(), 1, self.batch, 1)
        return known

    def _axes_in_view(self, call: OpCall, given: Tensor) -> list[int]:
        operand = call.operands.get("input")
        if not isinstance(operand, Tensor) or operand.layout != torch.strided or given.layout != torch.strided:
            return []
        if operand.untyped_storage().data_ptr() != given.untyped_storage().data_ptr():
            return []
        stride = given.stride(self.axis_of(given.dim()))
        return [a for a in range(operand.dim()) if operand.shape[a] == self.batch and operand.stride(a) == stride]

    def _fits(self, call: OpCall, axis: int) -> bool:
        shape = call.output_shape
        return axis < len(shape) - 1 and shape[axis] == self.batch
