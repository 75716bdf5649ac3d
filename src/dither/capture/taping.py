"""How an operation that uses a parameter is put on the tape.

Its parameters are detached, so that autograd computes input gradients only, and its outputs get graph nodes whose
gradients are delivered to the tape.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dither.capture import operations
from dither.capture.kinds import DERIVED, PARAMETER, Kinds
from dither.capture.places import after_tensor_hooks, alias, anchored
from dither.capture.randomness import DrawnFrom
from dither.capture.rows import row_by_row, shared_rows
from dither.capture.saving import hooked, keep
from dither.capture.uses import Hidden, OpCall, ParamUse, Tape, map_tensors, tensors_in
from dither.errors import UnsupportedOpError

CALL = "dither.call"
"""Key, in the metadata of a graph node, of the indices of the recorded outputs that are the node's."""


class TapeWriter:
    """Writes operations on a tape.

    Args:
        tape: what is written on.
        kinds: what the recording's tensors are.
        anchor: the leaf behind everything that is recorded.
        on_output: called with every recorded operation's outputs, in the graph, and their call's index.
        randomness: what a random operation without a rule does: "different" numbers for every example, as drawn; the
            "same" for all; or an "error".
    """

    def __init__(
        self,
        tape: Tape,
        kinds: Kinds,
        anchor: Tensor,
        on_output: Callable[[Tensor, int], None] | None,
        randomness: str,
    ) -> None:
        self.tape, self.kinds, self.anchor, self.on_output = tape, kinds, anchor, on_output
        self._randomness = randomness

    def write(
        self,
        func: Any,
        args: Any,
        kwargs: Any,
        operands: dict[str, Any],
        claimed: Any,
        replays: bool,
        resumed: Callable[[], AbstractContextManager[None]],
    ) -> Any:
        """Run an operation, its parameters detached, and put it on the tape.

        Args:
            func: of torch.
            args: of its call.
            kwargs: likewise.
            operands: the arguments by the operation's own names, where it has a rule.
            claimed: (slot, id of the tensor, rule) for every used tensor.
            replays: whether a checkpoint recomputes: then only the graph is made as it was.
            resumed: inside what it returns, the recorder sees operations. (Kept here, it would be a cycle, and what
                the tape holds would wait for the garbage collector.)

        Returns:
            What the operation returns, in the graph.
        """
        in_place = operations.is_in_place(operations.name_of(func))
        detach = _Detacher(clone=args[0] if in_place else None)
        saved = (map_tensors(detach, args), map_tensors(detach, kwargs), map_tensors(detach, operands))
        given = tensors_in(args, kwargs)
        known = [id(tensor) in self.kinds.by_id for tensor in given]
        again = any(rule.replays for _, _, rule in claimed)
        drawn_from = DrawnFrom(t.device for t in given) if again else None
        autocast = operations.autocast_of(args) if again else None
        fixed = frozenset(position for position, fix in enumerate(known) if fix) if again else frozenset()

        def live(tensor: Tensor) -> Tensor:
            kind = self.kinds.by_id.get(id(tensor))
            return detach(tensor) if kind is not None and kind[0] in (PARAMETER, DERIVED) else tensor

        output = func(*map_tensors(live, args), **map_tensors(live, kwargs))
        drawn_from = self._drawn(drawn_from, func)
        if drawn_from is not None and self._randomness == "same" and shared_rows(args, self.kinds.by_id) > 1:
            with resumed():
                examples = {
                    id(t): self._followed_from_here(t) for t in tensors_in(args) if id(t) not in self.kinds.by_id
                }
                return row_by_row(func, args, kwargs, examples, drawn_from)
        outputs = [t for t in tensors_in(output) if t.is_floating_point() or t.is_complex()]
        held, hidden = (
            self._hide(detach.done, saved, len(outputs), replays) if hooked() else ([None] * len(outputs), None)
        )
        if replays:
            return self._listen(output, outputs, None, held)
        first = len(self.tape.calls)
        source = not any(t.requires_grad for t, fix in zip(given, known, strict=True) if not fix)
        shown = saved if hidden is None else hidden
        for position, tensor in enumerate(outputs):
            call = OpCall(
                index=first + position,
                function=func,
                args=shown[0],
                kwargs=shown[1],
                operands=shown[2],
                output_shape=tensor.shape,
                versions=tuple((t, t._version) for t in tensors_in(*shown[:2])),
                output=position,
                source=source,
                drawn_from=drawn_from,
                autocast=autocast,
                fixed=fixed,
                hidden=hidden,
            )
            self.tape.calls.append(call)
            for slot, tensor_id, rule in claimed:
                used = self.kinds.by_id[tensor_id][1]
                self.tape.uses.append(ParamUse(call, slot, used, self.kinds.label(used), rule))
        return self._listen(output, outputs, first, held)

    def _drawn(self, before: DrawnFrom | None, func: Any) -> DrawnFrom | None:
        """The random state before the operation, if it drew from it."""
        if before is None or not before.moved:
            return None
        if self._randomness == "error":
            raise UnsupportedOpError(
                f"{operations.name_of(func)} takes a parameter and draws random numbers, which randomness='error' "
                "forbids.",
                fix="randomness='different' takes the gradient with the numbers that were drawn",
            )
        return before

    def _hide(self, detached: dict[int, Tensor], saved: Any, outputs: int, replays: bool) -> tuple[list[Any], Any]:
        """Give the inputs that are not parameters or constants into the care of the active hooks, once an output."""
        inputs = [copy for original, copy in detached.items() if original not in self.kinds.by_id]
        held = [keep(self.anchor, inputs) for _ in range(outputs)]
        if replays:
            return held, None
        places = {id(copy): Hidden(position, copy.shape) for position, copy in enumerate(inputs)}
        hidden = tuple(map_tensors(lambda t: places.get(id(t), t), tree) for tree in saved)
        return held, hidden

    def _in_graph(self, tensor: Tensor) -> Tensor:
        """An output with a graph node of its own, which an in-place operation on it leaves in its place."""
        if tensor._is_view():  # an in-place operation would put another node in the place of a view's
            tensor = torch.ops.aten._unsafe_view(tensor, tensor.shape)
        if not tensor.requires_grad:
            tensor = anchored(self.anchor, tensor)
        return tensor

    def _listen(self, output: Any, outputs: list[Tensor], first: int | None, held: list[Any]) -> Any:
        """Put the outputs into the graph, where their gradients will be delivered; `first` is None in a replay."""
        replaced: dict[int, Tensor] = {}
        for position, tensor in enumerate(outputs):
            live = self._in_graph(tensor)
            replaced[id(tensor)] = live
            if first is None:
                continue
            call = first + position
            after_tensor_hooks(live, partial(self.tape.deliver, call, held[position]))
            node: Any = live.grad_fn
            node.metadata.setdefault(CALL, []).append(call)
            if self.on_output is not None:
                self.on_output(live, call)
        return replaced[id(output)] if id(output) in replaced else map_tensors(lambda t: replaced.get(id(t), t), output)

    def _followed_from_here(self, tensor: Tensor) -> Tensor:
        """A tensor with a place in the graph: what is taken from it in order needs no other proof."""
        return tensor if tensor.requires_grad else alias(tensor, self.anchor, lambda gradient: None)


class _Detacher:
    """Detaches each tensor once, keeping identity; `clone` is about to be overwritten."""

    def __init__(self, clone: Tensor | None) -> None:
        self.done: dict[int, Tensor] = {}
        self._clone = clone

    def __call__(self, tensor: Tensor) -> Tensor:
        if id(tensor) not in self.done:
            self.done[id(tensor)] = tensor.detach().clone() if tensor is self._clone else tensor.detach()
        return self.done[id(tensor)]
