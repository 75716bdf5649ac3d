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
    if layout.one_each:
        return entries.movedim(layout.axis, 0).reshape(-1, *shape)
    return layout.split(entries).flatten(layout.axis + 1, layout.axis + 2).sum(layout.axis + 1).reshape(-1, *shape)


def _along_examples(use: ParamUse, entries: Tensor, shape: torch.Size) -> Tensor:
    """The parameter has its own entries for each example's place in the batch: mask the others away."""
    layout = use.examples
    owners = layout.owners(entries.device).view(-1, *[1] * (entries.dim() - layout.axis - 1))
    rows = [torch.where(owners == i, entries, 0).sum_to_size(shape) for i in range(layout.batch)]
    return torch.stack(rows)


class Elementwise(Rule):
    """An elementwise operation: each output entry depends on one entry of the parameter."""

    def __init__(self, slot: str) -> None:
        self.slot = slot

    def claims(self, operands: Mapping[str, Any], slot: str) -> bool:
        """Any options, but no tensor to write into."""
        return operands.get("out") is None

    def entries(self, use: ParamUse, grad_output: Tensor) -> Tensor:
        """Gradient of every output entry with respect to the parameter's entry there."""
        raise NotImplementedError

    def per_example_gradient(self, use: ParamUse, grad_output: Tensor, out: Tensor | None = None) -> Tensor:
        """Entrywise gradients summed over the broadcast."""
        return reduce_broadcast(use, self._entries(use, grad_output), use.parameter.shape)

    def own_axis(self, use: ParamUse) -> int | None:
        """The axis that broadcasting puts on the examples', if it is as long."""
        layout = use.examples
        axis = layout.axis - (len(use.call.output_shape) - use.parameter.dim())
        return axis if axis >= 0 and use.parameter.shape[axis] == layout.size else None

    def own_entries(self, use: ParamUse, grad_output: Tensor) -> Tensor:
        """Entrywise gradients summed over the other axes' broadcast."""
        return self._entries(use, grad_output).sum_to_size(use.parameter.shape)

    def _entries(self, use: ParamUse, grad_output: Tensor) -> Tensor:
        entries = self.entries(use, grad_output)
        # A real parameter has no imaginary part to change.
        return entries.real if entries.is_complex() and not use.parameter.is_complex() else entries


class BroadcastAdd(Elementwise):
    """A parameter that is added: every entry's gradient is the output's, times the option that scales it."""

    def __init__(self, slot: str = "bias", sign: float = 1.0, scale: str | None = None) -> None:
        super().__init__(slot)
        self.sign, self.scale = sign, scale

    def entries(self, use: ParamUse, grad_output: Tensor) -> Tensor:
        """The output gradient itself."""
        option = None if self.scale is None else use.operand(self.scale)
        factor = self.sign if option is None else self.sign * option.conjugate()
        return grad_output if factor == 1.0 else grad_output * factor


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
    if layout.axis == channel:
        sums = entries.sum(others) if others else entries
        if layout.batch == 1:  # one unbatched example
            return sums.unsqueeze(0)
        owned = layout.owners(sums.device) == torch.arange(layout.batch, device=sums.device).unsqueeze(1)
        return torch.where(owned, sums, 0)
    entries = entries.sum(others, keepdim=True) if others else entries
    if layout.one_each:
        return entries.movedim(layout.axis, 0).reshape(layout.batch, -1)
    rows = layout.split(entries).sum((layout.axis + 1, layout.axis + 2))
    return rows.reshape(layout.batch, -1)


def _spatial(use: ParamUse, entries: Tensor) -> int:
    spatial: int | None = getattr(use.rule, "spatial_dims", None)
    return entries.dim() - 2 if spatial is None else spatial


class NormWeight(Rule):
    """Weight of a normalisation layer: output gradient times the normalised input."""

    def __init__(self, normalise: Callable[[ParamUse, Tensor], Tensor], channels: bool = False) -> None:
        self.normalise = normalise
        self.channels = channels

    def per_example_gradient(self, use: ParamUse, grad_output: Tensor, out: Tensor | None = None) -> Tensor:
        """Sum of g * normalised input over everything that shares the weight."""
        x = use.operand("input")
        # Under autocast the layer ran in its output's precision, wider than its input's.
        normalised = self.normalise(use, x.to(torch.promote_types(x.dtype, grad_output.dtype)))
        entries = grad_output * normalised.to(grad_output.dtype).conj()
        return channel_sum(use, entries) if self.channels else reduce_broadcast(use, entries, use.parameter.shape)


def _eps(use: ParamUse) -> float:
    eps: float | None = use.operand("eps")
    return 1e-5 if eps is None else eps


def _layer(use: ParamUse, x: Tensor) -> Tensor:
    return F.layer_norm(x, use.operand("normalized_shape"), eps=_eps(use))


def _rms(use: ParamUse, x: Tensor) -> Tensor:
    # Without eps, the input's own precision sets it.
    x = x if use.operand("eps") is not None else use.operand("input")
    return F.rms_norm(x, use.operand("normalized_shape"), eps=use.operand("eps"))


def _group(use: ParamUse, x: Tensor) -> Tensor:
    return F.group_norm(x, use.operand("num_groups"), eps=_eps(use))


def _instance(use: ParamUse, x: Tensor) -> Tensor:
    if use.operand("use_input_stats") is not False:
        return F.instance_norm(x, eps=_eps(use))
    mean, variance = use.operand("running_mean").clone(), use.operand("running_var").clone()  # torch 2.6 writes them
    return F.instance_norm(x, mean, variance, use_input_stats=False, eps=_eps(use))


def _batch(use: ParamUse, x: Tensor) -> Tensor:
    """With running statistics: the recorder refuses those of the batch."""
    return F.batch_norm(x, use.operand("running_mean"), use.operand("running_var"), eps=_eps(use))


def operation_forms(name: str) -> tuple[Callable[..., Any], ...]:
    """The function of torch, the method, the operator and the in-place forms of an operation, those that exist."""
    short = {"div": "truediv", "remainder": "mod"}.get(name, name)
    methods = (name, f"{name}_", f"__{short}__", f"__i{short}__")
    found = [getattr(torch, name, None), *(getattr(torch.Tensor, method, None) for method in methods)]
    return tuple(function for function in found if function is not None)


def _register_sums_and_products() -> None:
    pair = ("input", "other")
    plus = {"input": BroadcastAdd("input"), "other": BroadcastAdd("other", scale="alpha")}
    minus = {"input": BroadcastAdd("input"), "other": BroadcastAdd("other", -1.0, scale="alpha")}
    from_other = {"input": BroadcastAdd("input", -1.0, scale="alpha"), "other": BroadcastAdd("other")}
    register_rule(operation_forms("add"), (*pair, "alpha"), plus)
    register_rule(torch.Tensor.__radd__, pair, plus)
    for name in ("sub", "subtract"):
        register_rule(operation_forms(name), (*pair, "alpha"), minus)
    register_rule((torch.rsub, torch.Tensor.__rsub__), (*pair, "alpha"), from_other)
    for name in ("mul", "multiply", "__rmul__"):
        register_rule(operation_forms(name), pair, {s: Multiply(s) for s in pair})


def _register_norms() -> None:
    channels = ChannelBias()
    register_rule(
        (F.layer_norm, torch.layer_norm),
        ("input", "normalized_shape", "weight", "bias", "eps", "cudnn_enable"),
        {"weight": NormWeight(_layer), "bias": BroadcastAdd()},
    )
    register_rule(
        (F.rms_norm, torch.rms_norm), ("input", "normalized_shape", "weight", "eps"), {"weight": NormWeight(_rms)}
    )
    register_rule(
        (F.group_norm, torch.group_norm),
        ("input", "num_groups", "weight", "bias", "eps", "cudnn_enabled"),
        {"weight": NormWeight(_group, channels=True), "bias": channels},
    )
    register_rule(
        F.instance_norm,
        ("input", "running_mean", "running_var", "weight", "bias", "use_input_stats", "momentum", "eps"),
        {"weight": NormWeight(_instance, channels=True), "bias": channels},
    )
    register_rule(
        F.batch_norm,
        ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"),
        {"weight": NormWeight(_batch, channels=True), "bias": channels},
    )


_register_sums_and_products()
_register_norms()
