"""Elementwise use of a parameter with broadcasting, and the affine part of normalisation layers.

For y = op(x, p) elementwise, example i's gradient is g * dy/dp summed over the entries that p was broadcast to.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dither.capture.uses import ParamUse
from dither.rules.rule import Rule, register_rule


def reduce_broadcast(use: ParamUse, entries: Tensor, shape: torch.Size) -> Tensor:
    """Sum entrywise gradients over what a parameter was broadcast to, per example.

    Args:
        use: gives the example axis of `entries`.
        entries: gradient of every output entry, the output's shape.
        shape: the parameter's shape, aligned to the right.

    Returns:
        Shape (B, *shape).
    """
    layout = use.examples
    offset = entries.dim() - len(shape)
    kept = [a for a in range(entries.dim()) if a >= offset and shape[a - offset] != 1]
    if layout.axis in kept and layout.batch > 1:
        return _along_examples(use, entries, shape)
    summed = [a for a in range(entries.dim()) if a not in kept and a != layout.axis]
    if entries.dim() == 0 or layout.axis in kept:  # one example only
        return (entries.sum(summed) if summed else entries).reshape(1, *shape)
    if summed:
        entries = entries.sum(summed, keepdim=True)
    return layout.split(entries).flatten(layout.axis + 1, layout.axis + 2).sum(layout.axis + 1).reshape(-1, *shape)


def _along_examples(use: ParamUse, entries: Tensor, shape: torch.Size) -> Tensor:
    """The parameter has its own entries for each example's place in the batch: mask the others away."""
    layout = use.examples
    owners = layout.owners(entries.device).view(-1, *[1] * (entries.dim() - layout.axis - 1))
    rows = [torch.where(owners == i, entries, 0).sum_to_size(shape) for i in range(layout.batch)]
    return torch.stack(rows)


class Elementwise(Rule):
    """An elementwise operation: runs the one operation again on the parameter, broadcast, to differentiate it."""

    def __init__(self, slot: str) -> None:
        self.slot = slot

    def entries(self, use: ParamUse, grad_output: Tensor) -> Tensor:
        """Gradient of every output entry with respect to the parameter's entry there."""
        leaf = use.operand(self.slot).expand(grad_output.shape).detach().requires_grad_()
        operands = {**use.call.operands, self.slot: leaf}
        with torch.enable_grad():
            output = _out_of_place(use)(*operands.values())
        gradient: Tensor
        (gradient,) = torch.autograd.grad(output, leaf, grad_output)
        return gradient

    def per_example_gradient(self, use: ParamUse, grad_output: Tensor, out: Tensor | None = None) -> Tensor:
        """Entrywise gradients summed over the broadcast."""
        return reduce_broadcast(use, self.entries(use, grad_output), use.parameter.shape)

    def claims(self, operands: Mapping[str, Any], slot: str) -> bool:
        """Positional operands only; options such as `alpha` or `rounding_mode` go to the fallback."""
        return set(operands) <= {"input", "other"}


class BroadcastAdd(Elementwise):
    """A parameter that is added: every entry's gradient is the output's."""

    def __init__(self, slot: str = "bias", sign: float = 1.0) -> None:
        super().__init__(slot)
        self.sign = sign

    def claims(self, operands: Mapping[str, Any], slot: str) -> bool:
        """Plain addition and biases; a scaled addition goes to the fallback."""
        return "alpha" not in operands and "beta" not in operands

    def entries(self, use: ParamUse, grad_output: Tensor) -> Tensor:
        """The output gradient itself."""
        return grad_output if self.sign == 1.0 else -grad_output


class Multiply(Elementwise):
    """A parameter that multiplies."""

    def entries(self, use: ParamUse, grad_output: Tensor) -> Tensor:
        """The output gradient times the other factor."""
        other = use.operand("other" if self.slot == "input" else "input")
        return grad_output * other.conj() if isinstance(other, Tensor) else grad_output * other


class ChannelBias(Rule):
    """A bias along axis 1 (convolution and group normalisation); axis 0 if the input is unbatched."""

    def __init__(self, spatial_dims: int | None = None) -> None:
        self.spatial_dims = spatial_dims

    def per_example_gradient(self, use: ParamUse, grad_output: Tensor, out: Tensor | None = None) -> Tensor:
        """Sum over all positions: (B, channels)."""
        return channel_sum(use, grad_output)


def channel_sum(use: ParamUse, entries: Tensor) -> Tensor:
    """Sum (N, C, *) entries over each example's rows and all positions: (B, C)."""
    layout = use.examples
    channel = entries.dim() - 1 - (_spatial(use, entries))
    others = [a for a in range(entries.dim()) if a not in (channel, layout.axis)]
    if layout.axis == channel:  # one unbatched example
        return entries.sum(others).unsqueeze(0) if others else entries.unsqueeze(0)
    entries = entries.sum(others) if others else entries
    if layout.axis > channel:
        entries = entries.T
    runs: Tensor = entries.unflatten(0, (layout.outer, layout.batch, layout.inner))
    return runs.sum((0, 2))


def _spatial(use: ParamUse, entries: Tensor) -> int:
    spatial: int | None = getattr(use.rule, "spatial_dims", None)
    return entries.dim() - 2 if spatial is None else spatial


class NormWeight(Rule):
    """Weight of a normalisation layer: output gradient times the normalised input."""

    def __init__(self, normalise: Callable[[ParamUse], Tensor], channels: bool = False) -> None:
        self.normalise = normalise
        self.channels = channels

    def per_example_gradient(self, use: ParamUse, grad_output: Tensor, out: Tensor | None = None) -> Tensor:
        """Sum of g * normalised input over everything that shares the weight."""
        entries = grad_output * self.normalise(use).to(grad_output.dtype)
        return channel_sum(use, entries) if self.channels else reduce_broadcast(use, entries, use.parameter.shape)


def _layer(use: ParamUse) -> Tensor:
    eps = use.operand("eps")
    return F.layer_norm(use.operand("input"), use.operand("normalized_shape"), eps=1e-5 if eps is None else eps)


def _rms(use: ParamUse) -> Tensor:
    return F.rms_norm(use.operand("input"), use.operand("normalized_shape"), eps=use.operand("eps"))


def _group(use: ParamUse) -> Tensor:
    eps = use.operand("eps")
    return F.group_norm(use.operand("input"), use.operand("num_groups"), eps=1e-5 if eps is None else eps)


def _out_of_place(use: ParamUse) -> Callable[..., Tensor]:
    return _PLAIN[use.call.function]


_PLAIN: dict[Any, Callable[..., Tensor]] = {}


def _family(name: str) -> tuple[Any, ...]:
    """The function, the method, the operator and the in-place forms of an elementwise operation."""
    short = {"div": "truediv"}.get(name, name)
    owners = [
        getattr(torch, name),
        getattr(torch.Tensor, name),
        getattr(torch.Tensor, f"{name}_"),
        getattr(torch.Tensor, f"__{short}__"),
        getattr(torch.Tensor, f"__i{short}__"),
    ]
    for owner in owners:
        _PLAIN[owner] = getattr(torch, name)
    return tuple(owners)


def _register() -> None:
    pair = ("input", "other")
    register_rule(_family("add"), pair, {s: BroadcastAdd(s) for s in pair})
    register_rule(torch.Tensor.__radd__, pair, {s: BroadcastAdd(s) for s in pair})
    register_rule(_family("sub"), pair, {"input": BroadcastAdd("input"), "other": BroadcastAdd("other", -1.0)})
    register_rule(torch.Tensor.__rsub__, pair, {"input": BroadcastAdd("input", -1.0), "other": BroadcastAdd("other")})
    register_rule((*_family("mul"), torch.Tensor.__rmul__), pair, {s: Multiply(s) for s in pair})
    register_rule(_family("div"), pair, {s: Elementwise(s) for s in pair})
    register_rule(
        F.layer_norm,
        ("input", "normalized_shape", "weight", "bias", "eps"),
        {"weight": NormWeight(_layer), "bias": BroadcastAdd()},
    )
    register_rule(F.rms_norm, ("input", "normalized_shape", "weight", "eps"), {"weight": NormWeight(_rms)})
    register_rule(
        F.group_norm,
        ("input", "num_groups", "weight", "bias", "eps"),
        {"weight": NormWeight(_group, channels=True), "bias": ChannelBias()},
    )


_register()
