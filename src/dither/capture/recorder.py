"""The recorder: sees every torch operation that takes a trainable parameter.

At such an operation the parameter is detached, so autograd computes input gradients only, and the output's
gradient is delivered to the tape. Tensors computed from parameters and constants alone stay in autograd and
count as parameters where they meet the examples (design: parameter-only subgraphs).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import Parameter
from torch.overrides import TorchFunctionMode

from dither.capture import operations, watching
from dither.capture.broadcast import takes_outer_difference
from dither.capture.custom import CustomNodes
from dither.capture.declared import Declared, declarations
from dither.capture.kinds import BATCHED, BUFFER, DERIVED, PARAMETER, Kinds
from dither.capture.nan import SHOWING
from dither.capture.ordering import Number, Numbers, reordered, says_nothing
from dither.capture.places import alias
from dither.capture.saving import hooked
from dither.capture.taping import TapeWriter
from dither.capture.uses import Tape, map_tensors, tensors_in
from dither.errors import NestedRecorderError, UnsupportedOpError


class Rules(Protocol):
    """What the recorder asks of the rules; see `dither.rules`."""

    custom: Any
    """The rule of a custom autograd function's use."""

    def claim(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], used: set[int]
    ) -> tuple[dict[str, Any], list[tuple[str | int, int, Any]]]:
        """Return operands by name and (slot, id of the tensor, rule) for every used tensor."""

    def decomposition(self, function: Callable[..., Any]) -> Callable[..., Any] | None:
        """The same operation written in operations that have rules, if there is one."""


class Recorder(TorchFunctionMode):
    """Record every use of `parameters` by the operations run inside `with recorder:`.

    Args:
        parameters: trainable parameters by name.
        buffers: the model's buffers and frozen parameters: constants, which the examples must not change.
        constants: what turned out to be a constant in an earlier recording, and is still there (a cached index).
        rules: finds the rules for an operation (`dither.rules.table`).
        on_output: called with every recorded operation's outputs, in the graph, and their call's index.
        randomness: what a random operation without a rule does: "different" numbers for every example, as drawn; the
            "same" for all; or an "error".
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        buffers: Iterable[Tensor],
        rules: Rules,
        on_output: Callable[[Tensor, int], None] | None = None,
        randomness: str = "different",
        constants: Iterable[Tensor] = (),
    ) -> None:
        super().__init__()
        self.tape = Tape()
        self._rules = rules
        self.kinds = Kinds(parameters, buffers, constants)
        for tensor, declared in declarations():
            if id(tensor) not in self.kinds.by_id:
                self.kinds.declare(tensor, declared)
        self._followed: dict[int, Tensor] = {}
        self.layouts: dict[int, tuple[Tensor, Declared]] = {}
        self.anchor = torch.zeros((), requires_grad=True)
        self.anchor.of_a_recording = True  # type: ignore[attr-defined]
        self.writer = TapeWriter(self.tape, self.kinds, self.anchor, on_output, randomness)
        self._trace: list[Any] = []
        self._numbers = Numbers()
        self._may_change = self.outer_difference = False
        self._replays = False
        self._began = 0
        self._entered = False

    def __enter__(self) -> Recorder:
        """Start recording; one recorder at a time in a thread."""
        watching.begin(self)
        self._compiled = watching.as_written()
        self._compiled.__enter__()
        first = self.anchor.clone().grad_fn
        self._began = self._numbers.began = first._sequence_nr() if first is not None else 0
        super().__enter__()
        self._entered = True
        return self

    def __exit__(self, *exc_info: Any) -> None:
        """Stop recording; nothing happens if it was not started."""
        if not self._entered:
            return
        self._entered = False
        if not self.tape.hides:  # no checkpoint will ask for them in backward
            self.kinds.forget_drawn()
        try:
            super().__exit__(*exc_info)
        finally:
            self._compiled.__exit__(*exc_info)
            watching.end()

    @contextmanager
    def replaying(self) -> Iterator[None]:
        """Treat operations as in the forward, without recording them: a checkpoint recomputes inside, in backward."""
        if not self.tape.hides:
            yield
            return
        self._replays = True
        try:
            with self.kinds.forgotten_after(), watching.as_written(), self.resumed():
                yield
        finally:
            self._replays = False

    @contextmanager
    def resumed(self) -> Iterator[None]:
        """See operations inside, where the mode is off: while it handles one."""
        super().__enter__()
        try:
            yield
        finally:
            super().__exit__(None, None, None)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """See nothing of what runs inside, where this is the innermost mode."""
        super().__exit__(None, None, None)
        try:
            yield
        finally:
            super().__enter__()

    def missed(self, what: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Take note, in the trace, of operations that were not seen."""
        self._trace.append((what, self._numbers.options_of(inputs), ()))
        self._gave(output)

    def _gave(self, output: Any) -> None:
        """An operation's results are new tensors, also where they have the place of old ones."""
        for tensor in [output] if isinstance(output, Tensor) else tensors_in(output):
            self._numbers.give(tensor)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Pass operations through; record those that use a parameter with the examples."""
        kwargs = kwargs or {}
        if func in operations.DESCRIBES:
            return func(*args, **kwargs)
        if getattr(func, "__wrapped__", func) in operations.BACKWARD:
            raise NestedRecorderError(
                "A backward pass runs inside the loss function, or inside another backward pass.",
                fix="return the per-example loss and let dither run the backward pass; no gradient penalties, and no "
                "activation checkpoints but torch.utils.checkpoint",
            )
        if func in operations.LEAVES_TORCH:
            for tensor in tensors_in(args[:1]):  # an array of the same memory: what is written into it, nobody sees
                self.kinds.unseen(tensor)
            return func(*map_tensors(torch.Tensor.detach, args), **kwargs)
        given = tensors_in(args, kwargs)
        output = self._dispatch(func, args, kwargs, given)
        if not self._replays:
            given_as = tuple([self._numbers.options_of(argument) for argument in args])
            self._trace.append((func, given_as, self._numbers.options_of(kwargs)))
            self._gave(output)
            if takes_outer_difference(func, given):  # with constants it is each example's own
                self.outer_difference |= not any(self.kinds.is_ours(tensor) for tensor in given)
            if not self._may_change:
                picked = given if func in operations.HOOKS else reordered(func, args, kwargs, given)
                self._may_change = any(self.kinds.varies(tensor) for tensor in picked)
        return output

    @property
    def trace(self) -> tuple[Any, ...]:
        """Every operation that ran, with its options, and what was said of the tensors that it was given.

        Where it is the same, with the same `shapes`, so are the examples' places.
        """
        numbered = ((self._numbers.known(t), declared.axis) for t, declared in self.kinds.declared.values())
        said = sorted((number, f"axis {axis}") for number, axis in numbered if number is not None)
        return (*self._trace, *(("declared", number, axis) for number, axis in said))

    @property
    def shapes(self) -> tuple[torch.Size | None, ...]:
        """Of every tensor that an operation was given or returned, in order."""
        return tuple(self._numbers.shapes)

    @property
    def may_change(self) -> bool:
        """Whether the examples' places may be others the next time, under the same trace.

        Rows are picked by data after a parameter was used; a hook, or an object that a custom autograd function is
        given, decides what becomes of their gradients; or operations ran that were not seen.
        """
        return self._may_change or self._numbers.unseen

    def number_of(self, tensor: Tensor) -> Number:
        """Which of the tensors of the trace a tensor is."""
        return self._numbers.of(tensor)

    def custom_nodes(self) -> CustomNodes:
        """What adopts the custom autograd functions of this recording."""
        return CustomNodes(self.tape, self._rules.custom, self._began, self.anchor, self.kinds.parameters_in_graph)

    def _dispatch(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], given: list[Tensor]
    ) -> Any:
        kinds = self.kinds.by_id
        used: set[int] = set()
        watched: list[Tensor] = []
        batch_free = True
        follows = made = False
        for tensor in given:
            kind = kinds.get(id(tensor))
            if kind is None and type(tensor) is Parameter:
                kind = self.kinds.state_behind(tensor)
            if kind is None:
                if id(tensor) in self.kinds.made:
                    made = True
                else:
                    batch_free = False
            elif kind[0] in (PARAMETER, DERIVED):
                if tensor.requires_grad:  # else it is frozen at this moment
                    used.add(id(tensor))
                if kind[0] == PARAMETER:
                    watched.append(tensor)
            elif kind[0] == BUFFER:
                watched.append(tensor)
            elif kind[0] == BATCHED:
                batch_free, follows = False, True
        made |= operations.reads_data(func, args)
        if made and used:
            batch_free = False
        if follows and torch.is_grad_enabled():
            args, kwargs = map_tensors(self._follow, args), map_tensors(self._follow, kwargs)
        if not batch_free or made:
            operations.refuse_batch_statistics(func, args, kwargs)
        if not batch_free:
            if func in operations.READS_METADATA:  # the other tensor lends its shape or dtype only
                used &= {id(args[0])}
                batch_free = id(args[0]) in kinds and not follows
            elif operations.picks_by_number(func, args) and id(args[0]) in used:
                batch_free = True
        versions = [tensor._version for tensor in watched]
        output = self._run(func, args, kwargs, used, batch_free, made)
        for tensor, version in zip(watched, versions, strict=True):
            if tensor._version != version:
                no_example = (batch_free and not made) or operations.writes_back_what_it_read(func, args, kwargs)
                self.kinds.changed(tensor, version, no_example, operations.name_of(func))
        return output

    def _run(self, func: Any, args: Any, kwargs: Any, used: set[int], batch_free: bool, made: bool) -> Any:
        if not used:
            return self._run_without_parameters(func, args, kwargs, batch_free, made)
        if batch_free:
            return self._run_on_parameters_alone(func, args, kwargs)
        if not torch.is_grad_enabled():
            return func(*args, **kwargs)
        return self._use(func, args, kwargs, used)

    def _follow(self, tensor: Tensor) -> Tensor:
        """A declared input's stand-in, which has a place in the graph."""
        kind = self.kinds.by_id.get(id(tensor))
        if kind is None or kind[0] != BATCHED or tensor.requires_grad or not tensor.is_floating_point():
            return tensor
        if id(tensor) not in self._followed:
            index = -1 - len(self.tape.followed)
            self.tape.followed[index] = tensor.shape
            self.layouts[index] = self.kinds.declared[id(tensor)]
            self._followed[id(tensor)] = alias(tensor, self.anchor, partial(self.tape.deliver, index, None))
        return self._followed[id(tensor)]

    def _run_without_parameters(self, func: Any, args: Any, kwargs: Any, batch_free: bool, made: bool) -> Any:
        name = operations.name_of(func)
        if not batch_free or made:
            targets = args[:1] if operations.is_in_place(name) else ()
            for target in tensors_in(targets, kwargs.get("out")):
                self.kinds.no_constant(target, name)
            func = SHOWING.get(func, func)
        random = batch_free and operations.draws(name)
        drawn = random or (self.kinds.any_drawn and not batch_free and self.kinds.only_drawn(args, kwargs))
        output = func(*args, **kwargs)
        if batch_free and not random:
            if made and not _is_number(func, output):
                self.kinds.made_of_data(output)
            else:
                self.kinds.constant(output)
        if drawn:
            self.kinds.drawn(output)
        return output

    def _run_on_parameters_alone(self, func: Any, args: Any, kwargs: Any) -> Any:
        if hooked():  # what is computed from parameters alone is asked for more than once a pass
            with saved_tensors_hooks(_as_it_is, _as_it_is):
                output = func(*args, **kwargs)
        else:
            output = func(*args, **kwargs)
        self.kinds.computed(output)
        if operations.is_in_place(operations.name_of(func)) and args and isinstance(args[0], Tensor):
            self.kinds.written(args[0])
        return output

    def declare(self, tensor: Tensor, declared: Declared) -> None:
        """Take note of what is said of a tensor while the recording runs."""
        self.kinds.declare(tensor, declared)

    def applied(self, function: Any, arguments: Any, output: Any) -> None:
        """Take note of what a custom autograd function gave."""
        self.kinds.computed_by_function(arguments, output)
        if not self._replays:
            self.missed(function, arguments, output)
            self._may_change |= says_nothing(arguments) and any(self.kinds.varies(t) for t in tensors_in(output))

    def _use(self, func: Any, args: Any, kwargs: Any, used: set[int]) -> Any:
        name = operations.name_of(func)
        if kwargs.get("out") is not None:
            raise UnsupportedOpError(
                f"{name} uses a parameter and writes its result into out=, where no gradient comes back.",
                fix="use what the operation returns, without out=",
            )
        in_place = operations.is_in_place(name) and id(args[0]) in used
        stays = in_place or (self.kinds.any_drawn and operations.keeps_shape(func, args, used))
        if stays and self.kinds.only_drawn(args, kwargs):  # a weight with a mask of its own: no example is in it
            return self._run_on_parameters_alone(func, args, kwargs)
        if in_place:
            raise UnsupportedOpError(
                f"{name} writes examples into a parameter, or a tensor computed from parameters, in place.",
                fix="build the tensor with torch.cat, torch.where or addition instead",
            )
        if torch._C._are_functorch_transforms_active():
            raise UnsupportedOpError(
                f"{name} uses a parameter inside a torch.func transform (vmap, grad, jvp).",
                fix="call the model on the whole batch; dither gives per-example gradients without vmap",
            )
        body = operations.in_two_steps(func, args) or self._rules.decomposition(func)
        if body is None:
            operands, claimed = self._rules.claim(func, args, kwargs, used)
            if any(rule.replays for _, _, rule in claimed):
                body = operations.opened(func)
        if body is not None:
            with self.resumed():
                return body(*args, **kwargs)
        return self.writer.write(func, args, kwargs, operands, claimed, self._replays, self.resumed)


def _is_number(function: Any, output: Any) -> bool:
    """Whether a tensor was made of a single number, which is none of the examples' rows."""
    return function in operations.FROM_DATA and bool(output.numel() <= 1)


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor
