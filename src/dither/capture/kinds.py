"""What the tensors of a recording are: parameters, computed from parameters, constants, state, or the examples'."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from dither.capture import operations
from dither.capture.declared import Declared
from dither.capture.uses import tensors_in
from dither.errors import BufferUpdateError

PARAMETER, DERIVED, CONSTANT, BUFFER, BATCHED = "parameter", "derived", "constant", "buffer", "batched"


class Kinds:
    """The kind of every tensor that is not known to be the examples' alone.

    Args:
        parameters: trainable, by name.
        buffers: the model's buffers and frozen parameters: constants, which the examples must not change.
        constants: what turned out to be a constant in an earlier recording, and is still there (a cached index).

    Attributes:
        by_id: (kind, tensor) by the tensor's id; the strong reference keeps the id from being used again.
        declared: (tensor, what was said of it) by its id.
        made: tensors made of lists and arrays, and of such and constants alone, by id: they may be the examples', and
            count as theirs where they meet a parameter.
    """

    def __init__(
        self, parameters: Mapping[str, Tensor], buffers: Iterable[Tensor], constants: Iterable[Tensor]
    ) -> None:
        self._names = {id(p): name for name, p in parameters.items()}
        self.by_id: dict[int, tuple[str, Tensor]] = {id(c): (CONSTANT, c) for c in constants}
        self.by_id |= {id(b): (BUFFER, b) for b in buffers}
        self.by_id |= {id(p): (PARAMETER, p) for p in parameters.values()}
        self.declared: dict[int, tuple[Tensor, Declared]] = {}
        self.made: dict[int, Tensor] = {}
        self._versions = {i: t._version for i, (kind, t) in self.by_id.items() if kind in (BUFFER, PARAMETER)}
        self._state: dict[Any, Tensor] | None = None
        self._numbers: dict[int, tuple[Tensor, int]] = {}
        self._constants_at: dict[int, list[int]] = {}

    @contextmanager
    def forgotten_after(self) -> Iterator[None]:
        """What is found inside is forgotten after it."""
        kept, self.by_id = self.by_id, dict(self.by_id)
        try:
            yield
        finally:
            self.by_id = kept

    def declare(self, tensor: Tensor, declared: Declared) -> None:
        """Take note of what is said of a tensor."""
        self.by_id[id(tensor)] = (CONSTANT if declared.axis is None else BATCHED, tensor)
        self.declared[id(tensor)] = (tensor, declared)

    def constants(self) -> Iterator[Tensor]:
        """Every tensor that was computed from constants alone; lists and arrays are none."""
        return (tensor for kind, tensor in self.by_id.values() if kind == CONSTANT)

    def label(self, tensor: Tensor) -> str:
        """A parameter's name, or what else it is, in words."""
        return self._names.get(id(tensor)) or f"a tensor of shape {tuple(tensor.shape)} computed from parameters"

    def parameters_in_graph(self) -> dict[Any, tuple[Tensor, str]]:
        """By graph node: every parameter, and every tensor computed from parameters alone, with its name."""
        found = {}
        for kind, tensor in self.by_id.values():
            if kind == PARAMETER or (kind == DERIVED and tensor.grad_fn is not None):
                node = torch.autograd.graph.get_gradient_edge(tensor).node if tensor.requires_grad else None
                found[node] = (tensor, self.label(tensor))
        found.pop(None, None)
        return found

    def varies(self, tensor: Tensor) -> bool:
        """Whether picking rows of the tensor moves rows that a gradient comes back to: places may change each step."""
        if not tensor.is_floating_point():
            return False
        kind = self.by_id.get(id(tensor))
        return kind[0] == BATCHED if kind is not None else tensor.requires_grad

    def is_ours(self, tensor: Tensor) -> bool:
        """Whether no example is behind the tensor: a parameter, state, a constant, or computed from these."""
        return self.by_id.get(id(tensor), (BATCHED,))[0] != BATCHED

    def may_miss(self, inputs: Sequence[Any], behind: Sequence[frozenset[int]]) -> bool:
        """Whether operations on these inputs need not be seen: none uses a parameter, every result is the examples'.

        Args:
            inputs: the tensors and numbers that the operations are given.
            behind: for each result, the positions of the tensors it is computed from.
        """
        examples = set()
        for position, tensor in enumerate(inputs):
            if type(tensor) is int:
                continue
            kind = self.by_id.get(id(tensor))
            if kind is None:
                if type(tensor) is not Tensor or id(tensor) in self._numbers:
                    return False
                examples.add(position)
            elif kind[0] not in (CONSTANT, BUFFER):
                return False
        return all(not examples.isdisjoint(positions) for positions in behind)

    def state_behind(self, parameter: Parameter) -> tuple[str, Tensor] | None:
        """The kind of a parameter that is none of the model's, if it is the memory of a buffer or frozen one.

        As `nn.Parameter(weight.T)`, whose making no torch function shows.
        """
        if self._state is None:
            buffers = [tensor for kind, tensor in self.by_id.values() if kind == BUFFER]
            self._state = {operations.entries_of(tensor): tensor for tensor in buffers}
        entries = operations.entries_of(parameter)
        if entries is None or entries not in self._state or operations.entries_of(self._state[entries]) != entries:
            return None
        return self.by_id.setdefault(id(parameter), (BUFFER, parameter))

    def computed(self, output: Any) -> None:
        """Take note of what is computed from parameters and constants alone."""
        for tensor in tensors_in(output):
            kind = self.by_id.get(id(tensor))
            if kind is None or kind[0] == CONSTANT:
                self.by_id[id(tensor)] = (DERIVED if tensor.requires_grad else CONSTANT, tensor)

    def computed_by_function(self, arguments: Any, output: Any) -> None:
        """A custom autograd function of parameters and constants alone gives such a tensor too."""
        kinds = [self.by_id.get(id(tensor)) for tensor in tensors_in(arguments)]
        if kinds and all(kind is not None and kind[0] != BATCHED for kind in kinds):
            self.computed(output)

    def written(self, target: Tensor) -> None:
        """Parameters were written into a tensor, and into what it is a view of: both are computed from them now."""
        for tensor in _and_base(target):
            if tensor.requires_grad and id(tensor) not in self._names:
                self.by_id[id(tensor)] = (DERIVED, tensor)

    def constant(self, output: Any) -> None:
        """Take note of what is computed from constants alone."""
        for tensor in tensors_in(output):
            if id(tensor) not in self.by_id:
                self.by_id[id(tensor)] = (CONSTANT, tensor)
                self._constants_at.setdefault(operations.memory_of(tensor), []).append(id(tensor))

    def made_of_data(self, output: Any) -> None:
        """Take note of what is made of lists or arrays, perhaps of the examples."""
        self.made |= {id(tensor): tensor for tensor in tensors_in(output) if id(tensor) not in self.by_id}

    def no_constant(self, target: Tensor, name: str) -> None:
        """The examples are written into a tensor in place: it is no constant, nor is what shares its memory.

        Raises:
            BufferUpdateError: it is the model's state.
        """
        for tensor in _and_base(target):
            kind = self.by_id.get(id(tensor))
            if kind is not None and kind[0] == BUFFER:
                raise _updated(tensor, name)
            self.unseen(tensor)

    def unseen(self, tensor: Tensor) -> None:
        """A tensor may be written into without a torch function: it is no constant, nor is what shares its memory."""
        self._forget(id(tensor))
        for number in self._constants_at.pop(operations.memory_of(tensor), ()):
            self._forget(number)

    def _forget(self, number: int) -> None:
        """A tensor, by its id, is no constant any more."""
        if self.by_id.get(number, ("",))[0] == CONSTANT:
            del self.by_id[number]

    @property
    def any_drawn(self) -> bool:
        """Whether random numbers were drawn that no example is behind."""
        return bool(self._numbers)

    def drawn(self, output: Any) -> None:
        """Take note of random numbers, and what is computed from them and constants alone.

        They are no constants, for they may be each example's own (noise).
        """
        self._numbers |= {id(t): (t, t._version) for t in tensors_in(output) if id(t) not in self.by_id}

    def only_drawn(self, args: Any, kwargs: Any) -> bool:
        """Whether no example is behind any of the tensors: random numbers, drawn from constants, may be among them."""
        for tensor in tensors_in(args, kwargs):
            kind, drawn = self.by_id.get(id(tensor)), self._numbers.get(id(tensor))
            if kind is None and (drawn is None or drawn[1] != tensor._version):  # as drawn, or changed since
                return False
            if kind is not None and kind[0] == BATCHED:
                return False
        return True

    def forget_drawn(self) -> None:
        """Let the random numbers go."""
        self._numbers.clear()

    def changed(self, tensor: Tensor, before: int, batch_free: bool, name: str) -> None:
        """State may change where no example has a part: power iterations, counters of steps.

        Args:
            tensor: state that an operation changed.
            before: its version before that.
            batch_free: whether no example had a part.
            name: of the operation.

        Raises:
            BufferUpdateError: an example may have had one.
        """
        if not batch_free:
            raise _updated(tensor, name)
        if self._versions.get(id(tensor)) == before:
            self._versions[id(tensor)] = tensor._version

    def check_state(self) -> None:
        """Raise BufferUpdateError if a buffer or parameter was changed in place unseen, from the examples perhaps."""
        for number, version in self._versions.items():
            tensor = self.by_id[number][1]
            if tensor._version != version:
                raise _updated(tensor, "an operation on the same memory")


def _and_base(tensor: Tensor) -> list[Tensor]:
    return [tensor] if tensor._base is None else [tensor, tensor._base]


def _updated(buffer: Tensor, name: str) -> BufferUpdateError:
    return BufferUpdateError(
        f"A buffer or parameter of shape {tuple(buffer.shape)} is changed in place by {name} from the examples.",
        fix="make the buffer a constant (eval mode, track_running_stats=False): it would not be private",
    )
