"""A loss that broadcasts outputs against targets, so that every example is compared with every example's target.

Outputs (B, 1) and targets (B,), or (B, 1, H, W) and (B, H, W), make differences (B, B, ...). Targets have no gradient:
no proof from the graph sees that example i's loss depends on target j. torch only warns.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import permutations
from typing import Any

import torch
from torch import Tensor

from dither.capture.operations import name_of
from dither.errors import CoupledExamplesError

_DIFFERENCES = {"sub", "subtract", "rsub", "mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss"}
"""Functions that take the difference of two tensors, by name."""

_OF_TWO = ("MseLossBackward", "SmoothL1LossBackward", "HuberLossBackward")
"""Graph nodes that keep output and target, broadcast."""

_OF_A_DIFFERENCE = ("PowBackward", "AbsBackward")
"""Graph nodes that keep what was squared, or whose absolute value was taken."""

_SLACK = 1e-5


def takes_outer_difference(function: Any, tensors: Sequence[Tensor]) -> bool:
    """Whether a function takes differences of two tensors, each of which is broadcast to the other."""
    if len(tensors) != 2 or name_of(function).strip("_") not in _DIFFERENCES:
        return False
    first, second = (tensor.shape for tensor in tensors)
    return first != second and torch.broadcast_shapes(first, second) not in (first, second)


def refuse_outer_differences(nodes: Iterable[Any], batches: Iterable[int]) -> None:
    """Raise if a loss takes differences of every example's output and every example's target.

    Args:
        nodes: the graph's nodes from the loss to what it reads of the model.
        batches: numbers of examples of the forwards behind it.

    Raises:
        CoupledExamplesError: it does.
    """
    sizes = {batch for batch in batches if batch > 1}
    for node in nodes:
        name = node.name()
        if name.startswith(_OF_TWO):
            operands = [node._saved_self, node._saved_target]
            outer = any(_differ(operands, a, b) for a, b in _pairs(operands[0], sizes))
        elif name.startswith(_OF_A_DIFFERENCE):
            operands = [node._saved_self]
            outer = any(_is_outer(operands[0], a, b) for a, b in _pairs(operands[0], sizes) if a < b)
        else:
            continue
        if outer:
            raise CoupledExamplesError(
                f"The loss compares each example's output with every example's target: outputs and targets of "
                f"different shapes were broadcast to {tuple(operands[0].shape)}.",
                fix="give both one shape before the loss: output.squeeze(1), or target.unsqueeze(1)",
            )


def _pairs(tensor: Any, sizes: set[int]) -> list[tuple[int, int]]:
    """Pairs of axes that have one entry per example each."""
    shape = tensor.shape if isinstance(tensor, Tensor) and tensor.numel() else ()
    return [(a, b) for a, b in permutations(range(len(shape)), 2) if shape[a] == shape[b] and shape[a] in sizes]


def _differ(operands: Sequence[Tensor], a: int, b: int) -> bool:
    """Whether the first is the same all along one axis and the second all along the other, being expanded."""
    first, second = ((operand.stride(a), operand.stride(b)) for operand in operands)
    return not first[0] and bool(first[1]) and bool(second[0]) and not second[1]


def _is_outer(difference: Tensor, a: int, b: int) -> bool:
    """Whether the entries are p - q with p the same all along one axis and q all along the other, and both vary."""
    entries = difference.detach().movedim((a, b), (0, 1))
    return _is_mixed_free(entries[:2, :2]) and _is_mixed_free(entries)


def _is_mixed_free(entries: Tensor) -> bool:
    slack = _SLACK * entries.abs().amax()
    down, along = entries - entries[:1], entries - entries[:, :1]
    return bool(
        ((down - down[:, :1]).abs().amax() <= slack) & (down.abs().amax() > slack) & (along.abs().amax() > slack)
    )
