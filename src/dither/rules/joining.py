"""A parameter joined to the examples: class tokens and prefixes by cat and stack; tensors broadcast together.

torch.cat takes its tensors in a list. It is recorded as `cat` of this file, which takes them one by one, so that each
is an operand; stack and its kin are recorded as cat.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from dither.capture.uses import ParamUse
from dither.rules.rule import Rule, register_decomposition, register_rule

_NAMES = tuple(f"tensor_{k}" for k in range(64))
"""More tensors than these are joined in groups."""


def cat(dim: int, *tensors: Tensor) -> Tensor:
    """`torch.cat` of tensors given one by one."""
    if has_torch_function(tensors):
        joined: Tensor = handle_torch_function(cat, tensors, dim, *tensors)
        return joined
    return torch.cat(tensors, dim)


class Joined(Rule):
    """One of the joined tensors: its part of the output gradient, each example's entries alone."""

    def per_example_gradient(self, use: ParamUse, grad_output: Tensor, out: Tensor | None = None) -> Tensor:
        """Shape (B, *tensor.shape)."""
        dim, start = self._place(use, grad_output.dim())
        part = self.own_entries(use, grad_output)
        layout = use.examples
        owners = layout.owners(part.device)
        if layout.axis == dim:
            owners = owners[start : start + use.parameter.shape[dim]]
        owners = owners.view(-1, *[1] * (part.dim() - layout.axis - 1))
        examples = torch.arange(layout.batch, device=part.device).view(-1, *[1] * part.dim())
        return torch.where(owners == examples, part, 0)

    def own_axis(self, use: ParamUse) -> int | None:
        """The examples' axis, unless the tensors are joined along it."""
        dim, _ = self._place(use, len(use.call.output_shape))
        return use.examples.axis if use.examples.axis != dim else None

    def own_entries(self, use: ParamUse, grad_output: Tensor) -> Tensor:
        """The tensor's part of the output gradient."""
        dim, start = self._place(use, grad_output.dim())
        part = grad_output.narrow(dim, start, use.parameter.shape[dim])
        return part.real if part.is_complex() and not use.parameter.is_complex() else part

    def _place(self, use: ParamUse, axes: int) -> tuple[int, int]:
        """The axis along which tensors are joined, and where on it this one begins."""
        dim = use.operand("dim") % axes
        before = [use.operand(name) for name in _NAMES[: _NAMES.index(str(use.slot))]]
        return dim, sum(t.shape[dim] for t in before if t.dim() == axes)  # cat skips empty vectors


def _cat(tensors: Sequence[Tensor], dim: int = 0, *, axis: int | None = None) -> Tensor:
    return _joined(dim if axis is None else axis, tensors)


def _joined(dim: int, tensors: Sequence[Tensor]) -> Tensor:
    most = len(_NAMES)
    if len(tensors) <= most:
        return cat(dim, *tensors)
    return _joined(dim, [cat(dim, *tensors[k : k + most]) for k in range(0, len(tensors), most)])


def _stack(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    dim = dim if dim >= 0 else dim + tensors[0].dim() + 1
    return _joined(dim, [t.unsqueeze(dim) for t in tensors])


def _hstack(tensors: Sequence[Tensor]) -> Tensor:
    tensors = [torch.atleast_1d(t) for t in tensors]
    return _joined(0 if tensors[0].dim() == 1 else 1, tensors)


def _vstack(tensors: Sequence[Tensor]) -> Tensor:
    return _joined(0, [torch.atleast_2d(t) for t in tensors])


def _broadcast_tensors(*tensors: Any) -> tuple[Tensor, ...]:
    given: Sequence[Tensor] = tensors[0] if len(tensors) == 1 and isinstance(tensors[0], (tuple, list)) else tensors
    shape = torch.broadcast_shapes(*(t.shape for t in given))
    return tuple(t.expand(shape) for t in given)


register_rule(cat, ("dim", *_NAMES), {name: Joined() for name in _NAMES})
register_decomposition((torch.cat, torch.concat, torch.concatenate), _cat)
register_decomposition(torch.stack, _stack)
register_decomposition(torch.hstack, _hstack)
register_decomposition((torch.vstack, torch.row_stack), _vstack)
register_decomposition(torch.broadcast_tensors, _broadcast_tensors)
