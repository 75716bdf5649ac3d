"""Elementwise operations without a formula of their own: the operation runs again on the parameter, broadcast.

Every output entry depends on one entry of the parameter, so one ordinary backward pass of the operation gives every
entry's gradient, and those are summed over the broadcast.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dither.capture.uses import ParamUse
from dither.rules.affine import Elementwise, operation_forms
from dither.rules.rule import register_rule

_PLAIN: dict[Any, Callable[..., Tensor]] = {}
"""What to run again instead of a form that writes in place, or that wants a parameter without axes."""


class Rerun(Elementwise):
    """Differentiates by running the one operation again.

    Args:
        slot: the parameter's name among the operands.
        order: the operands' names in order.
    """

    def __init__(self, slot: str, order: tuple[str, ...]) -> None:
        super().__init__(slot)
        self._position = order.index(slot)

    def entries(self, use: ParamUse, grad_output: Tensor) -> Tensor:
        """The operation's own derivative, entry by entry."""
        leaf = use.operand(self.slot).expand(grad_output.shape).detach().requires_grad_()
        call = use.call
        args, kwargs = list(call.args), dict(call.kwargs)
        if self._position < len(args):
            args[self._position] = leaf
        else:
            kwargs[self.slot] = leaf
        with torch.enable_grad():
            output = _PLAIN.get(call.function, call.function)(*args, **kwargs)
        gradient: Tensor
        (gradient,) = torch.autograd.grad(output, leaf, grad_output)
        return gradient


def _masked_fill(input: Tensor, mask: Tensor, value: Tensor) -> Tensor:
    return torch.where(mask, value, input)


def _register(names: str, operands: str, slots: str, plain: Callable[..., Tensor] | None = None) -> None:
    for name in names.split():
        forms = operation_forms(name)
        for function in forms:
            _PLAIN[function] = plain or forms[0]
        _register_rerun(forms, operands, slots)


def _register_rerun(functions: Any, operands: str, slots: str) -> None:
    order = tuple(operands.split())
    register_rule(functions, order, {slot: Rerun(slot, order) for slot in slots.split()})


_register("div divide true_divide", "input other rounding_mode", "input other")
_register("remainder fmod copysign atan2 arctan2 hypot logaddexp logaddexp2 xlogy", "input other", "input other")
_register("maximum minimum fmax fmin max min", "input other", "input other")
_register("pow float_power", "input exponent", "input exponent")
_register("lerp", "input end weight", "input end weight")
_register("addcmul addcdiv", "input tensor1 tensor2", "input tensor1 tensor2")
_register("clamp clip", "input min max", "input min max")
_register("clamp_min", "input min", "input min")
_register("clamp_max", "input max", "input max")
_register("masked_fill", "input mask value", "input value", _masked_fill)
_register_rerun(torch.where, "condition input other", "input other")
_register_rerun(torch.Tensor.where, "input condition other", "input other")
_register_rerun(torch.special.xlog1py, "input other", "input other")
