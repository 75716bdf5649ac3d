"""Rare examples under a memory budget: one gradient at a time, where all of them would not fit.

An example that is not finite, whose squares overflow, or whose rows cancel has its gradient looked at itself. Formed
for the whole batch that takes B x P; here it is the weighted sum in which every other example has weight zero, P.
Legend: B examples, P the parameter's elements.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dither.capture.uses import ParamUse, map_tensors
from dither.errors import MemoryBudgetError
from dither.rules.rule import at_least_float32

Received = Sequence[tuple[ParamUse, Tensor]]
"""Uses of one parameter and their output gradients."""


class Room:
    """What a binding budget leaves beside what was planned to be held.

    Args:
        left: bytes; infinite without a binding budget.
        budget: the whole of it, bytes.
    """

    def __init__(self, left: float = float("inf"), budget: float = float("inf")) -> None:
        self._left, self._budget = left, budget

    def fits(self, received: Received) -> bool:
        """Whether the parameter's per-example gradients can be formed for the moment."""
        return _bytes(received) <= self._left

    def hold(self, received: Received) -> bool:
        """The same, to be held until the sum."""
        if not self.fits(received):
            return False
        self._left -= _bytes(received)
        return True

    def refusal(self, received: Received) -> MemoryBudgetError:
        """Where there is no way within the budget."""
        use = received[0][0]
        return MemoryBudgetError(
            f"memory_budget is {self._budget:,.0f} bytes, of which {max(self._left, 0.0):,.0f} are left, and to tell "
            f"which examples are finite takes the gradients of {use.name} formed: {_bytes(received):,.0f} bytes.",
            fix="give a larger budget, fewer examples at once, or find why a loss is not finite",
        )


def _bytes(received: Received) -> float:
    use = received[0][0]
    return float(use.batch * use.parameter.numel() * max(4, use.parameter.element_size()))  # formed in float32 or wider


def squared_norms(received: Received, examples: Iterable[int], room: Room) -> Tensor:
    """Squared norms of these examples' gradients, float64; infinite where a gradient is not finite.

    Raises:
        MemoryBudgetError: whether an example's inputs are finite cannot be told without forming all gradients.
    """
    wrong = torch.stack([_spoiled(use, g, room) for use, g in received]).any(0)
    found = [torch.tensor(float("inf")) if bool(wrong[i]) else squared_norm(gradient_of(received, i)) for i in examples]
    return torch.stack([norm.to(wrong.device, torch.float64) for norm in found])


def squared_norm(gradient: Tensor) -> Tensor:
    """Of one gradient, float64."""
    flat = torch.view_as_real(gradient.resolve_conj()) if gradient.is_complex() else gradient
    norm: Tensor = torch.linalg.vector_norm(flat, dtype=torch.float64)
    return norm.square()


def gradient_of(received: Received, example: int) -> Tensor:
    """One example's gradient, the parameter's shape, float32 or wider; its own numbers must be finite."""
    parameter = received[0][0].parameter
    total = torch.zeros_like(parameter, requires_grad=False, dtype=at_least_float32(parameter.dtype))
    for use, grad_output in received:
        others = torch.ones(use.batch, dtype=torch.bool, device=grad_output.device)
        others[example] = False
        weights = (~others).to(torch.promote_types(grad_output.real.dtype, torch.float32))
        cleaned, own = without(use, grad_output, others)
        use.rule.add_weighted_sum(cleaned, own, weights, total)
    return total


def without(use: ParamUse, grad_output: Tensor, left_out: Tensor) -> tuple[ParamUse, Tensor]:
    """A use whose weighted sum does not depend on some examples, if their weights are zero and the others are finite.

    Args:
        use: of a rule that multiplies inputs and output gradients.
        grad_output: its output's gradient.
        left_out: bool (B,).

    Returns:
        The use with zeros for inputs that are not finite, and the gradient with zeros for these examples.
    """

    def finite(tensor: Tensor) -> Tensor:
        if not (tensor.is_floating_point() or tensor.is_complex()) or bool(torch.isfinite(tensor).all()):
            return tensor
        return torch.where(torch.isfinite(tensor), tensor, 0)

    return _changed(use, finite), torch.where(_entries_of(use, left_out, grad_output), 0, grad_output)


def _entries_of(use: ParamUse, examples: Tensor, output: Tensor) -> Tensor:
    """Which entries of an output are these examples', bool, to be broadcast to its shape."""
    layout = use.examples
    owned = examples[layout.owners(output.device)]
    return owned.view(-1, *[1] * (output.dim() - layout.axis - 1)) if output.dim() else owned.view(())


def _spoiled(use: ParamUse, grad_output: Tensor, room: Room) -> Tensor:
    """Which examples have an input or an output gradient that is not finite, (B,) bool.

    Times numbers that are neither zero nor large, in float64, inputs that are finite have a norm that is.
    """
    wrong: Tensor = use.examples.split((~torch.isfinite(grad_output)).float()).flatten(1).any(1)

    def wide(tensor: Tensor) -> Tensor:
        if tensor.is_complex():
            return tensor.to(torch.complex128)
        return tensor.double() if tensor.is_floating_point() else tensor

    generator = torch.Generator().manual_seed(0)
    factors = torch.rand(grad_output.shape, generator=generator, dtype=torch.float64) + 0.5
    norms = use.rule.tile_squared_norm(_changed(use, wide), wide(factors.to(grad_output.device)))
    if norms is None:
        raise room.refusal([(use, grad_output)])
    return wrong | ~torch.isfinite(norms)


def _changed(use: ParamUse, change: Callable[[Tensor], Tensor]) -> ParamUse:
    """The use with its operation's tensors changed, each once."""
    done: dict[int, Tensor] = {}

    def once(tensor: Tensor) -> Tensor:
        if id(tensor) not in done:
            done[id(tensor)] = change(tensor)
        return done[id(tensor)]

    call: Any = use.call
    trees = (map_tensors(once, tree) for tree in (call.args, call.kwargs, call.operands))
    args, kwargs, operands = trees
    return replace(use, call=replace(call, args=args, kwargs=kwargs, operands=operands))
