"""One recorded forward: its tape, its examples' places, its backward passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dither.capture.broadcast import refuse_outer_differences
from dither.capture.coverage import Leaves, check_loss, nodes_of, nothing_escapes
from dither.capture.declared import naming_undeclared
from dither.capture.examples import ExampleAxis, Layout, Ragged
from dither.capture.layouts import Places, Probe, decide_examples, with_axes
from dither.capture.probing import Replaying, Seed, run_backward, send_back
from dither.capture.recorder import Recorder
from dither.capture.taping import CALL
from dither.capture.uses import ParamUse, Tape
from dither.clipping.buffers import Buffers
from dither.clipping.memory import broadcast_of, memory_of, relative_to
from dither.errors import BufferUpdateError, CaptureError, ConfigurationError, CoverageError, UnsupportedOpError
from dither.rules import table

LossFunction = Callable[[], Tensor]


def trainable(model: nn.Module) -> dict[str, Tensor]:
    """The model's trainable parameters by name; a tied parameter once, by its first name."""
    return _trainable(dict(model.named_parameters()))


def _trainable(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = {name: p for name, p in named.items() if p.requires_grad}
    hooked = [name for name, p in found.items() if p._backward_hooks]
    if hooked:
        raise UnsupportedOpError(
            f"Parameter {hooked[0]} has a hook on its gradient, which would have to run on each example's.",
            fix="remove the hook; change the sum's gradients after clipped_sum, or freeze parts by splitting them off",
        )
    if not found:
        raise ConfigurationError("The model has no trainable parameters.", fix="set requires_grad=True on some of them")
    return found


def _check_mode() -> None:
    """Raise CoverageError where autograd cannot run, or what runs would be replayed without the recorder."""
    if torch.is_inference_mode_enabled():
        raise CoverageError(
            "Gradients are asked for inside torch.inference_mode.", fix="leave it, or use torch.no_grad around the rest"
        )
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        raise CoverageError(
            "A CUDA graph is being captured: its replays would skip the proofs, and clip with this batch's factors.",
            fix="call it outside of the capture; capture parts of the model without parameters",
        )


def _behind_a_call(node: Any) -> set[int]:
    """The edges of a recorded output's node: what lies behind is the model."""
    return set(range(len(node.next_functions))) if CALL in node.metadata else set()


def check_buffers(before: Mapping[str, Tensor], model: nn.Module, recorder: Recorder) -> None:
    """Raise BufferUpdateError for a buffer that another tensor took the place of, unless that is a constant."""
    constants = {id(tensor) for tensor in recorder.kinds.constants()} | set(recorder.kinds.made)
    for name, buffer in model.named_buffers():
        if name in before and before[name] is not buffer and id(buffer) not in constants:
            raise BufferUpdateError(
                f"Buffer {name} was replaced by a tensor computed from the examples.",
                fix="make the buffer a constant: it would not be private",
            )


def constants_of(model: nn.Module) -> Iterator[Tensor]:
    """What the examples must not change: buffers and frozen parameters."""
    yield from model.buffers()
    yield from (p for p in model.parameters() if not p.requires_grad)


class Recorded:
    """What a recorder saw while a model ran, and the places of the examples once they are decided.

    Args:
        model: whose trainable parameters are recorded.
        parameters: the recorded parameters by name.
    """

    def __init__(self, model: nn.Module, parameters: dict[str, Tensor]) -> None:
        self.parameters = parameters
        self.tape = Tape()
        self.batch = 0
        self.undecided = False
        self.likely: dict[int, ExampleAxis] = {}
        self._memory = memory_of(model)
        self._signed: int | None = None
        self._trace: tuple[Any, ...] = ()
        self._shapes: tuple[torch.Size | None, ...] = ()
        self._read: Any = None
        self._may_change = False
        self.replaying: Replaying | None = None
        self.anchor = torch.empty(0)

    def nodes(self) -> Mapping[int, Any]:
        """The graph node of each recorded output, by its call's index."""
        return {}

    def take(self, recorder: Recorder, losses: Tensor | None = None) -> None:
        """Take what a recorder saw, once it has stopped; and which of the tensors the losses are, where it saw them."""
        self._read = None if losses is None else recorder.number_of(losses)
        self.tape, self.anchor = recorder.tape, recorder.anchor
        self.replaying = recorder.replaying if recorder.tape.hides else None
        self._memory.keep_constants(recorder.kinds.constants())
        recorder.writer.on_output = None
        self._trace, self._shapes, self._may_change = recorder.trace, recorder.shapes, recorder.may_change

    @property
    def device(self) -> torch.device:
        """Where norms are added up: the first parameter's device."""
        return next(iter(self.parameters.values())).device

    @property
    def buffers(self) -> Buffers:
        """Memory kept between steps."""
        return self._memory.buffers

    def uses_by_call(self) -> dict[int, list[ParamUse]]:
        """The uses of each recorded operation, by its index."""
        found: dict[int, list[ParamUse]] = {}
        for use in self.tape.uses:
            found.setdefault(use.call.index, []).append(use)
        return found

    def decide(
        self,
        probe: Probe,
        known: Mapping[int, ExampleAxis] | None = None,
        context: Any = None,
        role: Any = None,
    ) -> bool:
        """Decide where the examples lie, from memory if this sequence of operations was decided before.

        Args:
            probe: sends NaN back from the losses.
            known: layouts of calls that are known beforehand.
            context: what else must be the same for a decision to hold; hashable.
            role: tells recordings of the same operations apart, whatever their batch size; hashable.

        Returns:
            Whether it was decided anew.

        Raises:
            CaptureError: its kinds, as `decide_examples`.
        """
        functions = hash(tuple(function for function, *_ in self._trace))
        signature = self._signature(context)
        self._signed = None if signature is None else hash(signature)
        kept = self._memory.recall(signature, (functions, role))
        anew = kept is None
        try:
            axes = self.decide_anew(probe, known, context) if kept is None else {**kept}
        except CaptureError:
            self.forget()
            raise
        self.undecided = any(axis is None for axis in axes.values())
        with_axes(self.tape, axes)
        return anew

    def forget(self) -> None:
        """Remember nothing of what was decided: a proof of the same operations failed."""
        self._memory.forget(self._signed)

    def decide_anew(
        self,
        probe: Probe,
        known: Mapping[int, ExampleAxis] | None = None,
        context: Any = None,
        thorough: bool = False,
    ) -> dict[int, Layout | None]:
        """Probe, and remember the layouts; `thorough` also where this sequence of operations was proved before."""
        self.refuse_beforehand()
        # Every pair of examples once for each sequence of operations; other batch sizes of it need the layouts only.
        trace = hash(relative_to(self.batch, self._trace))
        spread = tuple(broadcast_of(self.batch, shape) for shape in self._shapes)
        sequence = (trace, hash(spread), self._read, self.batch > 2, tuple(self.tape.followed), context)
        thorough |= self._may_change or sequence not in self._memory.uncoupled
        places = Places.of(self.tape, self.anchor, self.nodes)
        axes = decide_examples(places, self.batch, probe, thorough, known)
        if any(isinstance(axis, Ragged) or not (axis is None or axis.certain) for axis in axes.values()):
            return axes  # it is the data that order these rows, or more of them may be reached next time
        self._memory.uncoupled.add(sequence)
        regular = self._memory.keep(
            self._signature(context), {i: a for i, a in axes.items() if not isinstance(a, Ragged)}
        )
        self.likely = self._memory.likely(trace, self.batch, regular)
        return {**regular}

    def refuse_beforehand(self) -> None:
        """Raise CaptureError for what no probe would show; called before each."""

    def planned(self, key: Any, make: Callable[[], Any]) -> Any:
        """What was planned for the same operations and key, or what `make` gives now.

        None as a key, operations whose places are not kept and places that are still undecided: always anew.
        """
        if key is None or self._signed is None or self.undecided:
            return make()
        return self._memory.plan((self._signed, key), make)

    def _signature(self, context: Any) -> Any:
        """What must be the same for decided places to hold: every operation, its options, every shape, and the losses.

        None, never kept, where the places may be others the next time all the same.
        """
        if self._may_change:
            return None
        calls = tuple(call.output_shape for call in self.tape.calls)
        uses = tuple((use.call.index, use.slot, use.name) for use in self.tape.uses)
        seen = (self._trace, self._shapes, self._read)
        return (self.batch, seen, calls, uses, tuple(self.tape.followed.items()), context)


class Recording(Recorded):
    """A forward pass whose parameter uses are on a tape, with the examples' places decided.

    Args:
        model: the model whose trainable parameters are recorded.
        loss_fn: no arguments; returns one loss per example, shape (B,).
    """

    def __init__(self, model: nn.Module, loss_fn: LossFunction, randomness: str = "different") -> None:
        _check_mode()
        named = dict(model.named_parameters())
        parameters, before = _trainable(named), dict(model.named_buffers())
        recorder = Recorder(
            parameters,
            [*before.values(), *(p for p in named.values() if not p.requires_grad)],
            table,
            randomness=randomness,
            constants=memory_of(model).constants(),
        )
        with torch.enable_grad(), recorder:
            losses = loss_fn()
        recorder.kinds.check_state()
        if before:
            check_buffers(before, model, recorder)
        super().__init__(model, parameters)
        self.losses = check_loss(losses)
        self.batch = int(self.losses.shape[0])
        if self.batch and self.losses.grad_fn is None:
            raise CoverageError(
                "No trainable parameter of the model was used with the examples while loss_fn ran.",
                fix="call the model inside loss_fn, without torch.no_grad, torch.inference_mode or detach, and train "
                "this model's parameters",
            )
        self._outer_difference = recorder.outer_difference
        self._leaves = Leaves((), frozenset())
        if self.batch:
            self._leaves = Leaves.behind(self.losses, self.parameters, recorder.custom_nodes())
        self.take(recorder, self.losses)
        self._known: dict[int, ExampleAxis] = {}
        if self.batch:
            self._known = {i: declared.layout(t, self.batch) for i, (t, declared) in recorder.layouts.items()}
            with nothing_escapes(self._leaves, self.parameters), naming_undeclared(model):
                self.decide(self._probe, self._known)

    def nodes(self) -> Mapping[int, Any]:
        """As they lie behind the losses."""
        return {call: node for node in nodes_of([self.losses]) for call in node.metadata.get(CALL, [])}

    def refuse_beforehand(self) -> None:
        """Targets have no gradient: what compares every output with each of them is looked for in the loss itself."""
        if self._outer_difference:
            refuse_outer_differences(nodes_of([self.losses], _behind_a_call), [self.batch])

    def _probe(self, examples: list[int] | None, zero: bool = False) -> dict[int, Tensor]:
        seeds = [Seed.of(self.losses, ExampleAxis(0, 1, self.batch, 1))]
        return send_back(self.tape, seeds, examples, zero, self.replaying)

    def backward(self, receive: Callable[[ParamUse, Tensor], bool], keep_graph: bool = False) -> None:
        """Send the losses back; `receive` gets each use and its output gradient as they arrive.

        Args:
            receive: called once a use; returns whether it still needs the use's inputs.
            keep_graph: whether another pass follows.
        """
        uses = self.uses_by_call()
        late: list[tuple[int, Tensor]] = []

        def sink(call: int, gradient: Tensor) -> None:
            if call not in uses:  # a declared input
                return
            if uses[call][0].axis is None:
                late.append((call, gradient))
                return
            self.tape.calls[call].check_unchanged()
            needed = [receive(use, gradient) for use in uses[call]]
            if any(needed):
                return
            if again:
                self.tape.calls[call].conceal()
            else:
                self.tape.calls[call].release()

        seed = torch.ones_like(self.losses)
        again = keep_graph or self.undecided
        with nothing_escapes(self._leaves, self.parameters), torch.no_grad():
            self.tape.sink, self.tape.restores = sink, True
            try:
                run_backward([self.losses], [seed], again, self.replaying)
            finally:
                self.tape.sink, self.tape.restores = None, False
            self._settle(late, receive)

    def _settle(self, late: list[tuple[int, Tensor]], receive: Callable[[ParamUse, Tensor], bool]) -> None:
        """Deliver gradients that arrived where none had before: decide those outputs' examples now."""
        late = [(call, gradient) for call, gradient in late if bool(gradient.any())]
        if not late:
            return
        with_axes(self.tape, self.decide_anew(self._probe, self._known, thorough=True))
        for call, gradient in late:
            for use in self.tape.uses:
                if use.call.index == call:
                    receive(use, gradient)
