"""One recorded forward of a module: its batch size, its marked outputs, its examples' places.

The user computes the loss and calls backward, so nothing is decided here: `decide` runs just before the backward pass,
when the graph from the loss to the recorded operations is complete.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from dither.capture.coverage import Places, Probe, Seed, decide_examples, send_back_to
from dither.capture.examples import ExampleAxis, candidates
from dither.capture.recorder import Recorder, alias
from dither.capture.uses import OpCall, ParamUse, map_tensors
from dither.clipping.backward import Recorded
from dither.errors import CaptureError, CoupledExamplesError, CoverageError, ExampleAxisError
from dither.opacus.graph import Place, Reached, mark
from dither.opacus.separable import prove_separable
from dither.rules import claim

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


@dataclass
class KnownInputs:
    """What earlier forwards told of a module's inputs.

    Attributes:
        seen: shapes of inputs that were followed into the graph before.
        free: inputs, by their place among all, that had another size than the batch once: not one row per example.
        forwards: how many there were.
    """

    seen: set[Any] = field(default_factory=set)
    free: set[int] = field(default_factory=set)
    forwards: int = 0


class ModuleRecording(Recorded):
    """A forward pass of a module under the recorder.

    Args:
        model: the module whose parameters are recorded.
        parameters: those parameters by name.
        batch_first: whether inputs and outputs have the examples on axis 0, or on axis 1 from two axes on.
        inputs: what earlier forwards told.
    """

    def __init__(
        self, model: nn.Module, parameters: dict[str, Tensor], batch_first: bool, inputs: KnownInputs | None = None
    ) -> None:
        super().__init__(model, parameters)
        self._batch_first = batch_first
        self.inputs = KnownInputs() if inputs is None else inputs
        self.known: dict[int, ExampleAxis] = {}
        self._given: list[Tensor] = []
        self.followed: dict[int, GradientEdge] = {}
        self.sizes: set[int] = set()
        self.disagreeing: list[int] = []
        self.published = False
        self.merges = False
        self.hooks: Callable[[], Any] = lambda: None
        self.late: list[tuple[int, Tensor]] = []
        self.end_pass()
        self.recorder = Recorder(parameters, model.buffers(), claim, lambda output, call: mark(output, self, call))
        self.recorder.__enter__()

    def end_pass(self) -> None:
        """Forget what holds on to the graph, which holds on to this recording: no collector sees that circle."""
        self.decide_again: Callable[[], Any] = lambda: None
        self.receive: Callable[[ParamUse, Tensor], None] = lambda use, gradient: None
        self.late.clear()

    def follow(self, inputs: Any) -> Any:
        """The inputs, floating-point tensors with a place in the graph, so that a proof sees what mixes them.

        Only where their shapes are new, and at the 2nd, 4th, 8th... forward.
        """
        known, given = self.inputs, list(tensors_of(inputs))
        shapes = tuple(tensor.shape for tensor in given)
        known.forwards += 1
        if shapes in known.seen and known.forwards & (known.forwards - 1):
            return inputs
        known.seen.add(shapes)
        positions = {id(tensor): position for position, tensor in enumerate(given)}

        def followed(tensor: Tensor) -> Tensor:
            if tensor.requires_grad or not tensor.is_floating_point() or type(tensor) is not Tensor:
                return tensor
            tracked = alias(tensor, self.recorder.anchor)
            self.followed[-1 - positions[id(tensor)]] = get_gradient_edge(tracked)
            return tracked

        return map_tensors(followed, inputs)

    def finish(self, inputs: Any, output: Any) -> None:
        """Stop recording; find the batch size and mark the module's outputs.

        Args:
            inputs: the arguments of the forward.
            output: what it returned, of any structure.
        """
        self.recorder.__exit__(None, None, None)
        self.take(self.recorder)
        del self.recorder
        given = list(tensors_of(inputs))
        returned = [t for t in tensors_of(output) if t.requires_grad and not any(t is other for other in given)]
        self.batch = self._batch_size(given, returned)
        self._given = given
        for tensor in returned:
            if tensor.grad_fn is not None and self._is_batched(tensor):
                mark(tensor, self)

    def place_inputs(self) -> None:
        """Where the examples lie in the inputs, and in operations on them, now that the batch size is certain."""
        given, self._given = self._given, []
        self.known |= self._anchored(given)
        for position, tensor in enumerate(given):
            if not self._is_batched(tensor):
                self.inputs.free.add(position)
            index = -1 - position
            if position in self.inputs.free:
                self.followed.pop(index, None)
            elif index in self.followed:
                self.known[index] = ExampleAxis(self.axis_of(tensor.dim()), 1, self.batch, 1)

    def deliver_late(self, late: Sequence[tuple[int, Tensor]]) -> None:
        """Hand over output gradients whose places are decided only now."""
        uses = self.uses_by_call()
        for call, gradient in late:
            if uses[call][0].axis is None and not bool(torch.isfinite(gradient).any()):
                # The model has diverged: every example's gradient is NaN, wherever it lies, and every one is left out.
                layouts = candidates(gradient.shape, self.batch)
                anywhere = min(layouts, key=lambda layout: layout.axis, default=None)
                uses[call] = [replace(use, axis=anywhere) for use in uses[call]]
            for use in uses[call]:
                self.receive(use, gradient)

    def explained(self, error: CoupledExamplesError) -> CoupledExamplesError:
        """The same refusal; where inputs and outputs differ in their batch axis, with what that may mean."""
        if len(self.disagreeing) < 2:
            return error
        axis = 0 if self._batch_first else 1
        return CoupledExamplesError(
            f"{error.what}\n  Inputs and outputs of the module have sizes {self.disagreeing} on axis {axis}, where "
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
        self.sizes = {int(size) for size in sizes}
        self.disagreeing = sorted({int(size) for size in (*sizes, *outputs)})
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
                axes = {0} if len(call.output_shapes[0]) == call.operands["weight"].dim() else set()
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
        shape = call.output_shapes[0]
        return axis < len(shape) - 1 and shape[axis] == self.batch


def decide(reached: Reached, roots: Sequence[Tensor], losses: Seed | None, verify_loss: bool) -> None:
    """Decide every recording's layouts, and prove that neither the models nor the loss couple examples.

    Args:
        reached: what lies behind the roots.
        roots: what backward was called on.
        losses: one loss per example, if that is known; otherwise the module's outputs tell the examples apart.
        verify_loss: whether to prove that a scalar loss is a sum over examples.

    Raises:
        CoupledExamplesError: an example's loss depends on another example.
        ExampleAxisError: where the examples lie is undecided.
        CaptureError: its other kinds.
    """
    recordings: list[ModuleRecording] = [owner for owner in reached.owners if owner.batch]
    for recording in recordings:
        recording.place_inputs()
    seeds: list[Seed] = []

    def seeded() -> list[Seed]:
        if not seeds:
            seeds.extend([losses] if losses is not None else _frontier_seeds(reached))
        return seeds

    order = _order_of_loss(reached, losses) if losses is not None and reached.volatile else None
    anew = False
    for position, recording in enumerate(recordings):
        probe = _Probing(recording, reached, seeded)
        context = (reached.structure, position, order)
        recording.decide_again = partial(recording.decide_anew, probe, recording.known, context)
        try:
            anew |= recording.decide(probe, recording.known, context)
        except CoupledExamplesError as error:
            raise recording.explained(error) from error
    if losses is None and verify_loss and (anew or reached.volatile) and any(r.batch > 1 for r in recordings):
        prove_separable(roots, seeded(), reached.loss)


def _order_of_loss(reached: Reached, losses: Seed) -> tuple[ExampleAxis | None, ...]:
    """Where each example's loss reads the module's outputs, for losses that pick entries by index."""
    edges = {number: edge for number, (edge, _) in enumerate(reached.frontier)}
    shapes = {number: place.shape for number, (_, place) in enumerate(reached.frontier)}
    places = Places(shapes, lambda number: f"an output of the module that the loss reads, number {number}")
    found = decide_examples(places, losses.layout.batch, partial(send_back_to, edges, [losses]))
    return tuple(found[number] for number in sorted(found))


@dataclass(frozen=True, eq=False)
class _Probing:
    """Sends NaN from the seeds with as many examples as the recording; the others must not reach it."""

    recording: ModuleRecording
    reached: Reached
    seeds: Callable[[], Sequence[Seed]]

    def __call__(self, examples: list[int] | None) -> dict[int, Tensor]:
        return _probe(self.recording, self.reached, self.seeds())(examples)


def _probe(recording: ModuleRecording, reached: Reached, seeds: Sequence[Seed]) -> Probe:
    places = {**reached.calls.get(id(recording), {}), **recording.followed}
    same = [seed for seed in seeds if seed.layout.batch == recording.batch]
    others = [seed for seed in seeds if seed.layout.batch != recording.batch]
    if not same:
        raise CoverageError(
            f"A recorded forward of {recording.batch} examples is behind the loss, but nothing that tells them apart.",
            fix="return the predictions from the module, one row per example on the batch axis",
        )
    if others and any(bool(entries.any()) for entries in send_back_to(places, others, None).values()):
        raise CoupledExamplesError(
            f"A forward of {recording.batch} examples feeds a loss or a forward of {others[0].layout.batch}.",
            fix="keep one row per example on the batch axis from module to module and in the loss",
        )
    return partial(send_back_to, places, same)


def _frontier_seeds(reached: Reached) -> list[Seed]:
    """Seeds at the module outputs that the loss reads, then at recorded operations that it reads around them."""
    outputs = [(edge, place) for edge, place in reached.frontier if place.call is None and place.owner.batch]
    inner = [(edge, place) for edge, place in reached.frontier if place.call is not None and place.owner.batch]
    seeds = []
    for edge, place in outputs:
        layout = ExampleAxis(place.owner.axis_of(len(place.shape)), 1, place.owner.batch, 1)
        seeds.append(place.seed(edge, layout))
    for edge, place in inner:
        seeds.append(place.seed(edge, _layout_at(edge, place, seeds, reached)))
    return seeds


def _layout_at(edge: GradientEdge, place: Place, seeds: Sequence[Seed], reached: Reached) -> ExampleAxis:
    """The layout of an operation's output that the loss reads directly."""
    recording: ModuleRecording = place.owner
    assert place.call is not None
    known = recording.known.get(place.call)
    same = [seed for seed in seeds if seed.layout.batch == recording.batch]
    if known is None and same:
        axes = decide_examples(
            Places.of(recording.tape), recording.batch, _probe(recording, reached, same), False, recording.known
        )
        known = axes.get(place.call)
    return known or _only_layout(edge, place, same, reached)


def _only_layout(edge: GradientEdge, place: Place, others: list[Seed], reached: Reached) -> ExampleAxis:
    """The only layout of an operation's output under which no examples are coupled.

    Raises:
        ExampleAxisError: several layouts are possible.
        CoupledExamplesError: none is.
    """
    recording: ModuleRecording = place.owner
    left: list[tuple[ExampleAxis, dict[int, ExampleAxis | None]]] = []
    error: CaptureError | None = None
    for layout in sorted(candidates(place.shape, recording.batch), key=lambda a: (a.axis, a.outer)):
        if layout.axis == len(place.shape) - 1 > 0 and recording.batch > 1:
            continue  # the features of a layer
        probe = _probe(recording, reached, [*others, place.seed(edge, layout)])
        try:
            axes = decide_examples(Places.of(recording.tape), recording.batch, probe, True, recording.known)
        except CaptureError as refusal:
            error = error or refusal
            continue
        if not any(axes == found for _, found in left):
            left.append((layout, axes))
    if len(left) == 1:
        return left[0][0]
    if not left and error is not None:
        raise error
    assert place.call is not None
    raise ExampleAxisError(
        f"Where {recording.batch} examples lie in the output of {recording.tape.calls[place.call].name}, shape "
        f"{tuple(place.shape)}, is not certain: the module returns nothing with one entry per example.",
        fix="return the predictions or the per-example losses from the module, the examples on the batch axis, and "
        "compute the loss outside of it",
    )
