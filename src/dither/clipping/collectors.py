"""What is kept of each parameter's per-example gradients between the backward pass and the weighted sum.

A collector serves one parameter. It receives the output gradient of each of the parameter's uses as backward runs,
gives squared norms, and adds the weighted sum. Legend: B examples, P the parameter's elements.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Protocol

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from dither.allocator import reuses
from dither.capture.uses import ParamUse
from dither.clipping import one_by_one
from dither.clipping.one_by_one import Room
from dither.errors import SavedInputChangedError, UnsupportedOpError
from dither.rules.crossing import crossed_norm
from dither.rules.rule import add_weighted, at_least_float32, squared_rows


class Collector(Protocol):
    """One parameter's per-example gradients, formed or not."""

    strategy: str

    @property
    def keeps_inputs(self) -> bool:
        """Whether the inputs of what was received are needed until the sum."""
        ...

    def receive(self, use: ParamUse, grad_output: Tensor) -> None:
        """Take the output gradient of a use."""
        ...

    def squared_norm(self) -> Tensor | None:
        """Squared norms (B,); None if no gradient arrived."""
        ...

    def formed(self) -> Tensor | None:
        """Per-example gradients (B, *shape), formed now if they were not; None if no gradient arrived."""
        ...

    def wide_squared_norm(self, examples: Sequence[int]) -> Tensor | None:
        """Squared norms of some examples from the gradients themselves, float64; None if no gradient arrived."""
        ...

    def add_weighted_sum(self, weights: Tensor, into: Tensor, dropped: Tensor | None = None) -> None:
        """Add sum_i weights[i] * gradient i to `into`; `dropped`, bool (B,): which to leave out, whatever they are."""
        ...


class Buffers:
    """Memory for held gradients: kept between steps where fresh pages would cost more than the arithmetic."""

    def __init__(self) -> None:
        self._kept: dict[object, Tensor] = {}

    def take(self, key: object, batch: int, parameter: Tensor) -> Tensor:
        """An uninitialised (B, *parameter.shape) tensor.

        The same memory for the same key if it is large enough; fresh where the allocator has what activations left.
        """
        needed = batch * parameter.numel()
        if reuses(parameter.device, needed * parameter.element_size()):
            return parameter.new_empty(batch, *parameter.shape, requires_grad=False)
        kept = self._kept.pop(key, None)  # at once, so that no other thread takes it meanwhile
        fits = kept is not None and kept.numel() >= needed and kept.dtype == parameter.dtype
        if kept is None or not fits or kept.device != parameter.device or _in_use(kept):
            kept = parameter.new_empty(needed, requires_grad=False)
        taken = kept[:needed].view(batch, *parameter.shape)
        self._kept[key] = kept
        return taken


def _in_use(kept: Tensor) -> bool:
    """Whether somebody else (the user's `grad_sample`) still refers to the memory."""
    count = getattr(torch._C, "_storage_Use_Count", None)
    storage = kept.untyped_storage()  # refers to the memory, as the tensor does
    return count is None or count(storage._cdata) > 2


class Held:
    """Forms and keeps the gradients of a parameter that is used once."""

    strategy = "hold"
    keeps_inputs = False

    def __init__(self, buffers: Buffers) -> None:
        self._buffers = buffers
        self._gradients: Tensor | None = None
        self._squared: Tensor | None = None
        self._version = 0

    def receive(self, use: ParamUse, grad_output: Tensor) -> None:
        """Form the gradients, in memory kept from the last step for large parameters; take the norm while in cache."""
        out = None
        if not use.rule.holds_cheaply:
            out = self._buffers.take((use.name, use.slot), use.batch, use.parameter.detach())
        self._gradients = use.rule.per_example_gradient(use, grad_output, out)
        self._squared, self._version = squared_rows(self._gradients), self._gradients._version

    def squared_norm(self) -> Tensor | None:
        """As computed on arrival."""
        return self._squared

    def formed(self) -> Tensor | None:
        """What is held."""
        if self._gradients is not None:
            check_gradient(self._gradients, self._version)
        return self._gradients

    def wide_squared_norm(self, examples: Sequence[int]) -> Tensor | None:
        """Of what is held."""
        return _wide_squares(self.formed(), examples)

    def add_weighted_sum(self, weights: Tensor, into: Tensor, dropped: Tensor | None = None) -> None:
        """A weighted sum over the first axis."""
        _add(self.formed(), weights, into, dropped)


def _wide(grad_output: Tensor) -> Tensor:
    """In float32 or wider, as the norm was computed: gradients of half precision would be rounded after it."""
    return grad_output.to(at_least_float32(grad_output.dtype))


class Unformed:
    """Keeps inputs and output gradients of a parameter's uses; forms what a few rare examples need.

    Args:
        strategy: its name.
        room: what may be formed for these; beyond it each example's gradient is taken alone.
    """

    def __init__(self, strategy: str, room: Room) -> None:
        self.strategy = strategy
        self._room = room
        self._kept: list[tuple[ParamUse, Tensor, int]] = []
        self._formed: Tensor | None = None
        self._alone = False

    def _keep(self, use: ParamUse, grad_output: Tensor) -> None:
        self._kept.append((use, grad_output, grad_output._version))

    def _received(self) -> list[tuple[ParamUse, Tensor]]:
        for _, grad_output, version in self._kept:
            check_gradient(grad_output, version)
        return [(use, grad_output) for use, grad_output, _ in self._kept]

    def _norm_of_cancelling_rows(self) -> Tensor:
        """Norms of the gradients themselves, of which the sum is taken then too."""
        received = self._received()
        if self._room.hold(received):
            self._formed = self.formed()
            assert self._formed is not None
            return squared_rows(self._formed)
        self._alone = True
        return one_by_one.squared_norms(received, range(received[0][0].batch), self._room)

    def formed(self) -> Tensor | None:
        """Formed now, for the rare examples that need it."""
        if self._formed is not None:
            return self._formed
        every = Added()
        for use, grad_output in self._received():
            every.receive(use, _wide(grad_output))
        return every.formed()

    def wide_squared_norm(self, examples: Sequence[int]) -> Tensor | None:
        """Of gradients that are formed for it, all at once where there is room."""
        if self._formed is None and self._kept and not self._room.fits(received := self._received()):
            return one_by_one.squared_norms(received, examples, self._room)
        return _wide_squares(self.formed(), examples)

    def add_weighted_sum(self, weights: Tensor, into: Tensor, dropped: Tensor | None = None) -> None:
        """One weighted product a use, over all rows; or of what was formed."""
        if self._formed is not None:
            _add(self._formed, weights, into, dropped)
            return
        received = self._received()
        if not received:
            return
        for use, _ in received:
            use.call.check_unchanged()
        if self._alone:
            for example in range(len(weights)) if dropped is None else (~dropped).nonzero().flatten().tolist():
                gradient = one_by_one.gradient_of(received, example)
                into.add_(gradient.mul_(weights[example].to(gradient.dtype)))
        elif dropped is not None and self._room.fits(received):
            _add(self.formed(), weights, into, dropped)
        else:
            for use, grad_output in received:
                if dropped is not None:
                    use, grad_output = one_by_one.without(use, grad_output, dropped)
                use.rule.add_weighted_sum(use, grad_output, weights, into)


class NotFormed(Unformed):
    """Keeps input and output gradient of a parameter that is used once; strategy ghost or tile."""

    def __init__(self, strategy: str, room: Room) -> None:
        super().__init__(strategy, room)
        self._squared: Tensor | None = None

    def receive(self, use: ParamUse, grad_output: Tensor) -> None:
        """Compute the norm at once, while the tensors are in cache; where rows cancel, form the gradients."""
        self._kept.clear()
        self._keep(use, grad_output)
        norm = use.rule.squared_norm if self.strategy == "ghost" else use.rule.tile_squared_norm
        self._squared = norm(use, grad_output)
        if self._squared is None:
            self._squared = self._norm_of_cancelling_rows()
            if self._formed is not None:
                self._kept.clear()

    @property
    def keeps_inputs(self) -> bool:
        """Until it is told to forget, or if the gradients were formed."""
        return bool(self._kept)

    @property
    def needs_pass(self) -> bool:
        """Whether the sum takes another backward pass (for two passes)."""
        return self._formed is None and not self._alone

    def forget(self) -> None:
        """Drop the tensors, keep the norm (for two passes), unless each example's gradient is taken from them again."""
        if not self._alone:
            self._kept.clear()

    def squared_norm(self) -> Tensor | None:
        """As computed on arrival."""
        return self._squared


class Crossed(Unformed):
    """Keeps inputs and output gradient of all uses of a parameter; multiplies each use's rows with every other's."""

    keeps_inputs = True

    def __init__(self, room: Room) -> None:
        super().__init__("cross", room)

    def receive(self, use: ParamUse, grad_output: Tensor) -> None:
        """Keep them: the norm needs all."""
        self._keep(use, grad_output)

    def squared_norm(self) -> Tensor | None:
        """From the products of all rows; where these cancel, of the gradients, which the sum then takes as well."""
        received = self._received()
        if not received:
            return None
        squared: Tensor | None
        if len(received) == 1:
            use, grad_output = received[0]
            squared = use.rule.squared_norm(use, grad_output)
        else:
            squared = crossed_norm([use.rule.row_factors(use, g) for use, g in received])
        return self._norm_of_cancelling_rows() if squared is None else squared


class Added:
    """Forms each use's gradients and adds them per example: several uses, or tensors computed from the parameter."""

    strategy = "form"
    keeps_inputs = False

    def __init__(self) -> None:
        self._gradients: Tensor | None = None
        self._own = False
        self._version = 0

    def receive(self, use: ParamUse, grad_output: Tensor) -> None:
        """Form and add."""
        self.add(use.rule.per_example_gradient(use, grad_output))

    def add(self, gradients: Tensor) -> None:
        """Add per-example gradients (B, *shape)."""
        if self._gradients is None:
            self._gradients, self._version = gradients, gradients._version
        elif self._own and self._gradients.dtype == gradients.dtype:
            self._gradients += gradients
        else:  # the first may be a view of an output gradient, which is not ours to change
            check_gradient(self._gradients, self._version)
            self._gradients, self._own = self._gradients + gradients, True

    def squared_norm(self) -> Tensor | None:
        """Of the sum of all uses."""
        gradients = self.formed()
        return None if gradients is None else squared_rows(gradients)

    def formed(self) -> Tensor | None:
        """The sum of all uses."""
        if self._gradients is not None and not self._own:
            check_gradient(self._gradients, self._version)
        return self._gradients

    def wide_squared_norm(self, examples: Sequence[int]) -> Tensor | None:
        """Of the sum of all uses."""
        return _wide_squares(self.formed(), examples)

    def add_weighted_sum(self, weights: Tensor, into: Tensor, dropped: Tensor | None = None) -> None:
        """A weighted sum over the first axis."""
        _add(self.formed(), weights, into, dropped)


def _wide_squares(gradients: Tensor | None, examples: Sequence[int]) -> Tensor | None:
    if gradients is None:
        return None
    return torch.stack([one_by_one.squared_norm(gradients[example]) for example in examples])


def _add(gradients: Tensor | None, weights: Tensor, into: Tensor, dropped: Tensor | None) -> None:
    if gradients is not None:
        add_weighted(gradients, weights, into, None if dropped is None else ~dropped)


def pull_back(computed: Tensor | GradientEdge, gradients: Tensor, leaves: list[Tensor]) -> list[Tensor | None]:
    """Per-example gradients of a tensor computed from parameters, as gradients of the parameters.

    Args:
        computed: the tensor, with its graph, or its place in the graph; or one of the parameters.
        gradients: (B, *computed.shape).
        leaves: the parameters.

    Returns:
        For each parameter (B, *shape), or None if it had no part.

    Raises:
        UnsupportedOpError: no derivative can be taken for one example alone.
    """
    if isinstance(computed, Tensor):
        gradients = gradients.to(computed.dtype)
        if computed.is_leaf:
            return [gradients if leaf is computed else None for leaf in leaves]

    def pulled(sent: Tensor, batched: bool) -> Sequence[Tensor | None]:
        with torch.enable_grad():
            return torch.autograd.grad(
                computed, leaves, sent, is_grads_batched=batched, retain_graph=True, allow_unused=True
            )

    with suppress(RuntimeError):  # something in the derivative has no batching rule
        return list(pulled(gradients, True))
    try:
        columns = list(zip(*(pulled(row, False) for row in gradients), strict=True))
    except RuntimeError as error:
        raise UnsupportedOpError(
            f"A tensor of shape {tuple(gradients.shape[1:])} computed from parameters has no derivative that can be "
            f"taken for one example alone: {error}",
            fix="write what computes it with other torch operations",
        ) from error
    zeros = [torch.zeros_like(leaf, requires_grad=False) for leaf in leaves]
    return [
        None if all(row is None for row in rows) else torch.stack([zero if row is None else row for row in rows])
        for zero, rows in zip(zeros, columns, strict=True)
    ]


def check_gradient(gradient: Tensor, version: int) -> None:
    """Raise SavedInputChangedError if somebody changed a gradient in place after its norm was taken."""
    if gradient._version != version:
        raise SavedInputChangedError(
            f"A gradient of shape {tuple(gradient.shape)} was changed in place during the backward pass, after it was "
            "taken for the clipped sum: it would not be what was clipped.",
            fix="let backward methods and hooks return a new tensor (grad * 2 instead of grad.mul_(2)), as torch asks",
        )
