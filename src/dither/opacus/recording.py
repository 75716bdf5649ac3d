"""One recorded forward of a module: its batch size, its marked outputs, its examples' places.

The user computes the loss and calls backward, so nothing is decided here: `decide` runs just before the backward pass,
when the graph from the loss to the recorded operations is complete.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from dither.capture.coverage import Probe, Seed, decide_examples, send_back_to, separating_groups
from dither.capture.examples import ExampleAxis, candidates
from dither.capture.recorder import Recorder
from dither.capture.uses import OpCall
from dither.clipping.backward import Recorded
from dither.errors import CaptureError, CoupledExamplesError, CoverageError, ExampleAxisError
from dither.opacus.graph import Place, Reached, coupled_by, mark
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


class ModuleRecording(Recorded):
    """A forward pass of a module under the recorder.

    Args:
        model: the module whose parameters are recorded.
        parameters: those parameters by name.
        batch_first: whether inputs and outputs have the examples on axis 0, or on axis 1 from two axes on.
    """

    def __init__(self, model: nn.Module, parameters: dict[str, Tensor], batch_first: bool) -> None:
        super().__init__(model, parameters)
        self._batch_first = batch_first
        self.known: dict[int, ExampleAxis] = {}
        self.sizes: set[int] = set()
        self.published = False
        self.merges = False
        self.hooks: Callable[[], Any] = lambda: None
        self.recorder = Recorder(parameters, model.buffers(), claim, lambda output, call: mark(output, self, call))
        self.recorder.__enter__()

    def finish(self, inputs: Any, output: Any) -> None:
        """Stop recording; find the batch size and mark the module's outputs.

        Args:
            inputs: the arguments of the forward.
            output: what it returned, of any structure.
        """
        self.recorder.__exit__(None, None, None)
        self.take(self.recorder)
        del self.recorder
        given, returned = list(tensors_of(inputs)), list(tensors_of(output))
        self.batch = self._batch_size(given, returned)
        self.known = self._anchored(given)
        for tensor in returned:
            if tensor.requires_grad and tensor.grad_fn is not None and self._is_batched(tensor):
                mark(tensor, self)

    def explained(self, error: CoupledExamplesError) -> CoupledExamplesError:
        """The same refusal; where inputs and outputs differ in their batch axis, with what that may mean."""
        if len(self.sizes) < 2:
            return error
        axis = 0 if self._batch_first else 1
        return CoupledExamplesError(
            f"{error.what}\n  Inputs and outputs of the module have sizes {sorted(self.sizes)} on axis {axis}, where "
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
    anew = [r for r in recordings if r.recall(reached.structure) is None]
    seeds: list[Seed] = []
    if anew:
        seeds = [losses] if losses is not None else _frontier_seeds(reached)
    for recording in recordings:
        probe = _probe(recording, reached, seeds) if recording in anew else _never
        try:
            recording.decide(probe, recording.known, reached.structure)
        except CoupledExamplesError as error:
            raise recording.explained(error) from error
    if losses is None and verify_loss and any(r.batch > 1 for r in anew):
        _prove_separable(roots, seeds)


def _never(examples: list[int] | None) -> dict[int, Tensor]:
    raise AssertionError("layouts were recalled")


def _probe(recording: ModuleRecording, reached: Reached, seeds: Sequence[Seed]) -> Probe:
    """Sends NaN from the seeds with as many examples as the recording; the others must not reach it."""
    places = reached.calls.get(id(recording), {})
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
            recording.tape, recording.batch, _probe(recording, reached, same), False, recording.known
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
            axes = decide_examples(recording.tape, recording.batch, probe, True, recording.known)
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


def _prove_separable(roots: Sequence[Tensor], seeds: Sequence[Seed]) -> None:
    """Raise CoupledExamplesError unless the loss is a sum of one term per example of what it reads."""
    for batch in {seed.layout.batch for seed in seeds if seed.layout.batch > 1}:
        groups, _ = separating_groups(batch)
        coupled = coupled_by(roots, [seed for seed in seeds if seed.layout.batch == batch], groups)
        if coupled is not None:
            which = f"example {coupled[0]}" if len(coupled) == 1 else f"{len(coupled)} examples"
            raise CoupledExamplesError(
                f"The loss couples the examples: its derivative by the outputs of {which} depends on other examples.",
                fix="let the loss be a mean or a sum of one term per example (no statistics over the batch, no root or "
                "logarithm of the batch mean, no in-batch negatives)",
            )
