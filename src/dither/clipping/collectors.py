"""What is kept of each parameter's per-example gradients between the backward pass and the weighted sum.

A collector serves one parameter. It receives the output gradient of each of the parameter's uses as backward runs,
gives squared norms, and adds the weighted sum. Those here form the gradients; `unformed.py` has those that do not.
Legend: B examples, P the parameter's elements.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Protocol

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from dither.capture.uses import ParamUse
from dither.clipping import one_by_one
from dither.clipping.buffers import Buffers
from dither.errors import SavedInputChangedError, UnsupportedOpError
from dither.rules.rule import add_weighted, squared_rows


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
        return wide_squares(self.formed(), examples)

    def add_weighted_sum(self, weights: Tensor, into: Tensor, dropped: Tensor | None = None) -> None:
        """A weighted sum over the first axis."""
        add_kept(self.formed(), weights, into, dropped)


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
        return wide_squares(self.formed(), examples)

    def add_weighted_sum(self, weights: Tensor, into: Tensor, dropped: Tensor | None = None) -> None:
        """A weighted sum over the first axis."""
        add_kept(self.formed(), weights, into, dropped)


def wide_squares(gradients: Tensor | None, examples: Sequence[int]) -> Tensor | None:
    """Squared norms of some examples' gradients, float64; None if there are none."""
    if gradients is None:
        return None
    return torch.stack([one_by_one.squared_norm(gradients[example]) for example in examples])


def add_kept(gradients: Tensor | None, weights: Tensor, into: Tensor, dropped: Tensor | None) -> None:
    """Add sum_i weights[i] * gradients[i] to `into`, but for the examples that are dropped, bool (B,)."""
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
