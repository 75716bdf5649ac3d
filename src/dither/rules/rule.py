"""The rule protocol, the table of operations, and how a use finds its rule.

A rule is the mathematics of one operation family for one operand. Legend: B examples, T rows per example,
P the parameter's number of elements.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import dither.kernels as kernels
from dither.capture.uses import ParamUse, tensors_in
from dither.rules.crossing import RowFactors


@dataclass(frozen=True)
class Cost:
    """Predicted work of one use.

    Attributes:
        hold: floating-point operations to form all per-example gradients.
        ghost: floating-point operations of the squared norms without forming them, 0 if they are never formed.
        held_bytes: memory of the per-example gradients, bytes.
        weighted: floating-point operations of the weighted sum without forming them.
        row_bytes: memory traffic of weighing each example's rows for that sum, bytes.
    """

    hold: float
    ghost: float
    held_bytes: float
    weighted: float = 0.0
    row_bytes: float = 0.0


class Rule:
    """One operation family's mathematics for one operand.

    A subclass must give `per_example_gradient`; it overrides the rest where it can avoid forming that gradient.
    """

    replays = False
    """Whether the rule runs the operation again, and so needs the random state from before it."""

    holds_cheaply = True
    """Whether per-example gradients are small enough always to be formed (rank-one or vector parameters)."""

    def claims(self, operands: Mapping[str, Any], slot: str) -> bool:
        """Whether this rule is exact for these operands; otherwise the fallback is asked."""
        return True

    def per_example_gradient(self, use: ParamUse, grad_output: Tensor, out: Tensor | None = None) -> Tensor:
        """Each example's gradient, shape (B, *parameter.shape); written into `out` where given and possible."""
        raise NotImplementedError

    def squared_norm(self, use: ParamUse, grad_output: Tensor) -> Tensor | None:
        """Each example's squared gradient norm, shape (B,); None where its terms cancel, see `cancels`."""
        return squared_rows(self.per_example_gradient(use, grad_output))

    def tile_squared_norm(self, use: ParamUse, grad_output: Tensor) -> Tensor | None:
        """The same in tiles of the parameter, so that little memory is needed."""
        return self.squared_norm(use, grad_output)

    def add_weighted_sum(self, use: ParamUse, grad_output: Tensor, weights: Tensor, into: Tensor) -> None:
        """Add the sum over examples of weights[i] * gradient i to `into`, shape parameter.shape."""
        add_weighted(self.per_example_gradient(use, grad_output), weights, into)

    def own_axis(self, use: ParamUse) -> int | None:
        """The operand's axis whose entry r meets entry r of the output's examples' axis, and no other; None if none.

        Then `own_entries` gives what the operand's gradient consists of.
        """
        return None

    def own_entries(self, use: ParamUse, grad_output: Tensor) -> Tensor:
        """Gradient of each entry of the operand, shape parameter.shape, over all examples: each is one example's."""
        raise NotImplementedError

    def crosses(self, use: ParamUse) -> bool:
        """Whether `row_factors` gives the use's rows."""
        return False

    def row_factors(self, use: ParamUse, grad_output: Tensor) -> RowFactors:
        """The rows that the use's per-example gradients are sums of, to be multiplied with other uses'."""
        raise NotImplementedError

    def cost(self, use: ParamUse) -> Cost:
        """Predicted work; by default only what the formed gradients take, for these are always formed."""
        return Cost(0.0, 0.0, float(use.batch * use.parameter.numel() * use.parameter.element_size()))


_WIDENED = 1 << 20
"""Entries of half-precision gradients that are turned to float32 at once for a weighted sum: they stay in the cache."""

_CHUNK = 1024
"""Squares added one after another in float32. Of 2^23 the last digits are lost: the norm comes out 2e-4 too small."""


def _rows(gradients: Tensor) -> Tensor:
    """(B, *shape) to (B, P), also if there are no examples."""
    if gradients.dim() == 2:
        return gradients
    return gradients.reshape(gradients.shape[0], math.prod(gradients.shape[1:]))


def all_strided(operands: Mapping[str, Any]) -> bool:
    """Whether no operand is sparse or nested: such have no rows to take apart."""
    return all(x.layout == torch.strided and not x.is_nested for x in operands.values() if isinstance(x, Tensor))


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """In which dtype sums are taken of numbers of this one: float32, or a wider one, or its complex kin."""
    return torch.promote_types(dtype, torch.float32)


def squared_rows(gradients: Tensor) -> Tensor:
    """Squared norm of each example's gradient: (B, *shape) to (B,), in float32 or wider."""
    if kernels.serve(gradients):
        return kernels.squared_rows(gradients)
    flat = _rows(gradients)
    if flat.is_complex():
        flat = torch.view_as_real(flat.resolve_conj()).flatten(1)
    wide = at_least_float32(flat.dtype)
    whole = flat.shape[1] - flat.shape[1] % _CHUNK
    if whole <= _CHUNK:
        return _norms(flat, wide).square()
    squares = _norms(flat[:, :whole].unflatten(1, (-1, _CHUNK)), wide).square().sum(1, dtype=torch.float64)
    return squares.add_(_norms(flat[:, whole:], wide).square()).to(wide)


def cancels(squared: Tensor, terms: Tensor, dtype: torch.dtype) -> bool:
    """Whether an example's gradient is so small against its terms that a norm and a sum would not round alike.

    Then what is clipped by that norm could exceed the bound by more than rounding: the gradients are to be formed, so
    that norm and sum are taken of the same numbers.

    Args:
        squared: squared norms of the gradients, (B,).
        terms: sums of the squared norms of the terms that each gradient is a sum of, or more, (B,).
        dtype: in which the terms are added.
    """
    smallest = min((2**13 * torch.finfo(dtype).eps) ** 2, 0.01)
    return bool((squared < smallest * terms).any())


def _norms(rows: Tensor, dtype: torch.dtype) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(rows, dim=-1, dtype=dtype)
    return norms


def add_weighted(gradients: Tensor, weights: Tensor, into: Tensor, kept: Tensor | None = None) -> None:
    """Add sum_i weights[i] * gradients[i] to `into` in place.

    Args:
        gradients: shape (B, *into.shape).
        weights: shape (B,).
        into: what is added to; float32 or wider, as products and sums are.
        kept: bool (B,), the examples to add; None for all. The others are left out, whatever they hold.
    """
    if kernels.serve(gradients, into):
        kernels.add_weighted(gradients, weights, into, kept)
        return
    if kept is not None:
        gradients, weights = gradients[kept], weights[kept]
    flat = _rows(gradients)
    wide = at_least_float32(flat.dtype)
    weights = weights.to(wide)
    if flat.dtype != wide:
        total = (
            into.view(-1) if into.is_contiguous() and into.dtype == wide else into.new_zeros(into.numel(), dtype=wide)
        )
        step = max(1, _WIDENED // max(1, len(flat)))
        for start in range(0, len(total), step):
            total[start : start + step].addmv_(flat[:, start : start + step].to(wide).T, weights)
        if total.data_ptr() != into.data_ptr():
            into.add_(total.view(into.shape))
    elif into.is_contiguous() and into.dtype == flat.dtype:
        into.view(-1).addmv_(flat.T, weights)
    else:
        into.add_((weights @ flat).view(into.shape))


@dataclass(frozen=True)
class Signature:
    """An operation's operand names in order, and the rule of each operand that may be a parameter."""

    names: tuple[str, ...]
    rules: Mapping[str, Rule]


_TABLE: dict[Callable[..., Any], Signature] = {}


def register_rule(
    functions: Callable[..., Any] | Iterable[Callable[..., Any]], names: Iterable[str], rules: Mapping[str, Rule]
) -> None:
    """Give operations their rules.

    Args:
        functions: torch functions or methods as the recorder sees them (e.g. `F.linear`, `torch.Tensor.add`).
        names: the operation's argument names, in order.
        rules: by argument name, the rule used when that argument is a parameter.
    """
    signature = Signature(tuple(names), dict(rules))
    for function in [functions] if callable(functions) else functions:
        _TABLE[function] = signature


_DECOMPOSITIONS: dict[Callable[..., Any], Callable[..., Any]] = {}


def register_decomposition(
    functions: Callable[..., Any] | Iterable[Callable[..., Any]], body: Callable[..., Any]
) -> None:
    """Have an operation recorded as the operations it is made of.

    Args:
        functions: torch functions as the recorder sees them.
        body: takes the same arguments and gives the same outputs.
    """
    for function in [functions] if callable(functions) else functions:
        _DECOMPOSITIONS[function] = body


class Table:
    """What the recorder asks of the rules.

    Args:
        fallback: the rule of what nobody claims.
        custom: the rule of custom autograd functions.
    """

    def __init__(self, fallback: Rule, custom: Rule) -> None:
        self._fallback = fallback
        self.custom = custom

    def decomposition(self, function: Callable[..., Any]) -> Callable[..., Any] | None:
        """The operations that an operation is made of, if it is recorded as these."""
        return _DECOMPOSITIONS.get(function)

    def claim(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], used: set[int]
    ) -> tuple[dict[str, Any], list[tuple[str | int, int, Any]]]:
        """The operands by name, and (slot, id of the tensor, rule) for every used tensor."""
        signature = _TABLE.get(function)
        if signature is not None:
            operands = dict(zip(signature.names, args, strict=False)) | kwargs
            slots = [(name, id(value)) for name, value in operands.items() if id(value) in used]
            known = {i for _, i in slots} == used and len(args) <= len(signature.names)
            if known and all(n in signature.rules and signature.rules[n].claims(operands, n) for n, _ in slots):
                return operands, [(name, i, signature.rules[name]) for name, i in slots]
        first: dict[int, int] = {}
        for position, tensor in enumerate(tensors_in(args, kwargs)):
            if id(tensor) in used:
                first.setdefault(id(tensor), position)
        return {}, [(position, i, self._fallback) for i, position in first.items()]
