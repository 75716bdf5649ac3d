"""Products of a parameter and other factors, summed over some axes: batched matmul, einsum, bilinear maps.

Every axis has a label. A label of the parameter is free (it is in the output alone), summed (in the other factor
alone) or shared (in both: heads, experts). Labels of factor and output that the parameter lacks are rows; the examples
lie along one of them. Legend: B examples, H shared entries, T rows per example, d summed and p free features: with
the other factor x (B, H, T, d) and the output gradient g (B, H, T, p), example i's gradient is g^T x, head by head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dither.capture.uses import ParamUse
from dither.rules.linear import outer_ghost_norm, outer_gradient, outer_tile_norm, weighed
from dither.rules.replay import replayed
from dither.rules.rule import Cost, Rule, all_strided

Labels = tuple[Hashable, ...]


@dataclass(frozen=True)
class Product:
    """One operation as a sum of products, as seen from one of its factors.

    Attributes:
        parameter: labels of the parameter's axes.
        factors: the other factors and the labels of their axes.
        output: labels of the output's axes.
        scale: a number that multiplies the sum.
    """

    parameter: Labels
    factors: tuple[tuple[Tensor, Labels], ...]
    output: Labels
    scale: float = 1.0


Reader = Callable[[Mapping[str, Any], str], Product | None]
"""Reads an operation's operands as a product seen from one of them; None if it is not one."""


@dataclass(frozen=True)
class _Form:
    """Shared, summed, free and row labels, of axes that are not broadcast; and every label's size."""

    shared: Labels
    summed: Labels
    free: Labels
    rows: Labels
    sizes: Mapping[Hashable, int]
    product: Product

    @property
    def right(self) -> bool:
        """Whether the parameter's order is shared, free, summed: g^T x rather than x^T g."""
        own = [label for label in self.product.parameter if label in self.free + self.summed]
        return own[: len(self.free)] == list(self.free)

    @property
    def formed(self) -> Labels:
        """Labels of the gradient as the matrix product gives it."""
        return self.shared + (self.free + self.summed if self.right else self.summed + self.free)

    @property
    def in_order(self) -> bool:
        """Whether the parameter's own order is the same."""
        return self.formed == tuple(label for label in self.product.parameter if label in self.formed)

    def size(self, labels: Sequence[Hashable]) -> int:
        return math.prod(self.sizes[label] for label in labels)


def _form(parameter: Tensor, product: Product | None) -> _Form | None:
    """The form of a product; None where the rule does not hold."""
    if product is None:
        return None
    everything = [(parameter, product.parameter), *product.factors]
    sizes: dict[Hashable, int] = {}
    for tensor, labels in everything:
        if tensor.dim() != len(labels) or len(set(labels)) != len(labels):
            return None
        for label, size in zip(labels, tensor.shape, strict=True):
            sizes[label] = max(size, sizes.get(label, size)) if size else 0
    own, *others = ([x for x, n in zip(ls, t.shape, strict=True) if n == sizes[x]] for t, ls in everything)
    other = {label for labels in others for label in labels}
    output = product.output
    if any(label not in output and label not in other for label in own) or len(set(output)) != len(output):
        return None  # an axis of the parameter that is summed by itself, or a diagonal
    return _Form(
        shared=tuple(label for label in own if label in other and label in output),
        summed=tuple(label for label in own if label not in output),
        free=tuple(label for label in own if label not in other),
        rows=tuple(label for label in output if label not in own),
        sizes=sizes,
        product=product,
    )


class Contraction(Rule):
    """A parameter in a sum of products.

    Args:
        read: gives the operation's labels.
    """

    holds_cheaply = False

    def __init__(self, read: Reader) -> None:
        self.read = read

    def claims(self, operands: Mapping[str, Any], slot: str) -> bool:
        """Products in which each axis of the parameter is free, summed or shared."""
        once = sum(operand is operands[slot] for operand in operands.values()) == 1
        return (
            once
            and all_strided(operands)
            and operands.get("out") is None
            and _form(operands[slot], self.read(operands, slot)) is not None
        )

    def _form(self, use: ParamUse) -> _Form | None:
        """The form; None where the examples lie along the parameter's own axes."""
        operands, slot = use.call.operands, str(use.slot)
        form = _form(operands[slot], self.read(operands, slot))
        assert form is not None, "claimed"
        layout = use.examples
        along = form.product.output[layout.axis] if layout.batch > 1 else None
        return None if along is not None and along not in form.rows else form

    def _pair(self, use: ParamUse, grad_output: Tensor, form: _Form) -> tuple[Tensor, Tensor]:
        """The other factor x (B, H, T, d) and the output gradient g (B, H, T, p)."""
        layout, labels = use.examples, form.product.output + form.summed
        x = _other_factor(form, labels)
        g = grad_output if form.product.scale == 1.0 else grad_output * form.product.scale
        one = layout.batch == 1
        x, g = (x.unsqueeze(0), g.unsqueeze(0)) if one else (layout.split(x), layout.split(g))
        places: dict[Hashable, list[int]] = {}
        for k, label in enumerate(labels):
            after = not one and k > layout.axis
            places[label] = [k + 1, k + 2] if not one and k == layout.axis else [k + 2 if after else k + 1]
        x = _four_axes(x, places, (form.shared, form.rows, form.summed, form.free)).squeeze(-1)
        g = _four_axes(g, places, (form.shared, form.rows, form.free))
        common = torch.promote_types(x.dtype, g.dtype)
        return x.to(common).conj().resolve_conj(), g.to(common)

    def per_example_gradient(self, use: ParamUse, grad_output: Tensor, out: Tensor | None = None) -> Tensor:
        """Each example's g^T x in the parameter's own order."""
        form = self._form(use)
        if form is None:
            return replayed(use, grad_output)
        x, g = (t.flatten(0, 1) for t in self._pair(use, grad_output, form))
        right, left = (x, g) if form.right else (g, x)
        if out is not None and form.in_order and out.dtype == right.dtype:
            return outer_gradient(right, left, out.view(len(x), left.shape[-1], right.shape[-1])).view(out.shape)
        return _in_order(outer_gradient(right, left), form, (use.batch,)).reshape(use.batch, *use.parameter.shape)

    def _norm(self, use: ParamUse, grad_output: Tensor, ghost: bool) -> Tensor | None:
        form = self._form(use)
        if form is None:
            return super().squared_norm(use, grad_output)
        x, g = (t.flatten(0, 1) for t in self._pair(use, grad_output, form))
        norm = outer_ghost_norm if ghost or x.shape[1] == 1 else outer_tile_norm
        squared = norm(x, g)
        return None if squared is None else squared.view(use.batch, -1).sum(1)

    def squared_norm(self, use: ParamUse, grad_output: Tensor) -> Tensor | None:
        """Ghost norm, head by head."""
        return self._norm(use, grad_output, ghost=True)

    def tile_squared_norm(self, use: ParamUse, grad_output: Tensor) -> Tensor | None:
        """Norm in tiles of free features."""
        return self._norm(use, grad_output, ghost=False)

    def add_weighted_sum(self, use: ParamUse, grad_output: Tensor, weights: Tensor, into: Tensor) -> None:
        """One matrix product a head over all rows, the weights folded into the smaller factor."""
        form = self._form(use)
        if form is None:
            super().add_weighted_sum(use, grad_output, weights, into)
            return
        x, g = self._pair(use, grad_output, form)
        x, g = weighed(x, g, weights)
        x, g = (t.transpose(0, 1).flatten(1, 2) for t in (x, g))  # (H, B * T, features)
        right, left = (x, g) if form.right else (g, x)
        if form.in_order and into.is_contiguous() and into.dtype == right.dtype:
            target = into.view(len(left), left.shape[-1], right.shape[-1])
            if len(left) == 1:
                target[0].addmm_(left[0].mT, right[0])
            else:
                target.baddbmm_(left.mT, right)
        else:
            into.add_(_in_order(torch.bmm(left.mT, right), form, ()).reshape(into.shape))

    def cost(self, use: ParamUse) -> Cost:
        """T p d a head and example formed; T^2 (p + d) for the ghost norm."""
        form = self._form(use)
        held = float(use.batch * use.parameter.numel() * use.parameter.element_size())
        if form is None:
            return Cost(held, 2 * held, held, 2 * held)
        heads, p, d = form.size(form.shared), form.size(form.free), form.size(form.summed)
        rows = form.size(form.rows) // use.batch
        ghost = 2.0 * use.batch * heads * rows * rows * (p + d) if rows > 1 else 0.0
        formed = 2.0 * use.batch * heads * rows * p * d
        weighed = 2.0 * use.batch * heads * rows * min(p, d) * use.parameter.element_size()
        return Cost(formed, ghost, held, formed, weighed)


def _four_axes(tensor: Tensor, places: Mapping[Hashable, list[int]], groups: tuple[Labels, ...]) -> Tensor:
    """Examples ahead, then one axis for each group of labels; `places` gives the axes of each label."""
    found = [[place for label in group for place in places[label]] for group in groups]
    ordered = tensor.permute(0, *(place for group in found for place in group))
    sizes = [math.prod(tensor.shape[place] for place in group) for group in found]
    return ordered.reshape(tensor.shape[0], *sizes)


def _in_order(formed: Tensor, form: _Form, leading: tuple[int, ...]) -> Tensor:
    """Put the axes of formed matrices in the parameter's own order, after `leading` axes of those sizes."""
    ahead = len(leading)
    own = [label for label in form.product.parameter if label in form.formed]
    full = formed.reshape(*leading, *(form.sizes[label] for label in form.formed))
    return full.permute(*range(ahead), *(ahead + form.formed.index(label) for label in own))


def _other_factor(form: _Form, labels: Labels) -> Tensor:
    """The product of the other factors, with one axis for each of `labels`, of size one where it has none."""
    factors: list[tuple[Tensor, Labels]] = []
    for tensor, own in form.product.factors:
        broadcast = [k for k, label in enumerate(own) if tensor.shape[k] != form.sizes[label]]
        kept = tuple(label for k, label in enumerate(own) if k not in broadcast)
        factors.append((tensor.squeeze(broadcast) if broadcast else tensor, kept))
    present = tuple(label for label in labels if any(label in own for _, own in factors))
    tensor, own = factors[0]
    if len(factors) > 1 or set(own) != set(present):
        number = {label: k for k, label in enumerate({label: None for _, ls in factors for label in ls})}
        flat = [part for t, ls in factors for part in (t, [number[label] for label in ls])]
        tensor, own = torch.einsum(*flat, [number[label] for label in present]), present
    tensor = tensor.permute([own.index(label) for label in present])
    for k, label in enumerate(labels):
        tensor = tensor if label in present else tensor.unsqueeze(k)
    return tensor
