"""Matrix products in all their names, and einsum: each read as labels for the contraction rule."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dither.capture.uses import Hidden
from dither.rules.affine import BroadcastAdd
from dither.rules.contraction import Contraction, Labels, Product, Reader
from dither.rules.linear import LinearWeight
from dither.rules.rule import Rule, register_rule

_ELLIPSIS = "..."
_TENSORS = (Tensor, Hidden)
"""Factors; one that an activation checkpoint holds still has its shape, which is all that is read here."""


def _batch(count: int) -> Labels:
    """Labels of leading axes, aligned to the right."""
    return tuple((_ELLIPSIS, k) for k in range(count - 1, -1, -1))


def _pair(
    operands: Mapping[str, Any], slot: str, names: tuple[str, str], labels: tuple[Labels, Labels], output: Labels
) -> Product | None:
    own = names.index(slot)
    scale = operands.get("alpha")
    if isinstance(scale, complex):
        return None
    return Product(
        labels[own], ((operands[names[1 - own]], labels[1 - own]),), output, 1.0 if scale is None else float(scale)
    )


def _matmul(left: str, right: str, summed_batch: bool = False) -> Reader:
    """X (..., i, k) times y (..., k, j), vectors without i or j; `summed_batch` sums the leading axis."""

    def read(operands: Mapping[str, Any], slot: str) -> Product | None:
        x, y = operands.get(left), operands.get(right)
        if not isinstance(x, _TENSORS) or not isinstance(y, _TENSORS) or not x.dim() or not y.dim():
            return None
        batches = _batch(max(x.dim(), y.dim()) - 2)
        of_x: Labels = (*_batch(x.dim() - 2), "i", "k") if x.dim() > 1 else ("k",)
        of_y: Labels = (*_batch(y.dim() - 2), "k", "j") if y.dim() > 1 else ("k",)
        output = (() if summed_batch else batches) + tuple(n for n in ("i", "j") if n in of_x + of_y)
        return _pair(operands, slot, (left, right), (of_x, of_y), output)

    return read


def _linear(operands: Mapping[str, Any], slot: str) -> Product | None:
    x, weight = operands["input"], operands["weight"]
    out_features: Labels = ("j",) if weight.dim() == 2 else ()
    leading = _batch(x.dim() - 1)
    return _pair(operands, slot, ("input", "weight"), ((*leading, "k"), (*out_features, "k")), leading + out_features)


def _inner(operands: Mapping[str, Any], slot: str) -> Product | None:
    x, y = operands["input"], operands["other"]
    if not x.dim() or not y.dim():
        return None
    of_x, of_y = (tuple((n, k) for k in range(t.dim() - 1)) for n, t in (("i", x), ("j", y)))
    return _pair(operands, slot, ("input", "other"), ((*of_x, "k"), (*of_y, "k")), of_x + of_y)


def _outer(left: str, right: str) -> Reader:
    def read(operands: Mapping[str, Any], slot: str) -> Product | None:
        if not isinstance(operands.get(left), _TENSORS) or not isinstance(operands.get(right), _TENSORS):
            return None
        return _pair(operands, slot, (left, right), (("i",), ("j",)), ("i", "j"))

    return read


def _tensordot(operands: Mapping[str, Any], slot: str) -> Product | None:
    a, b, dims = operands.get("a"), operands.get("b"), operands.get("dims", 2)
    if not isinstance(a, _TENSORS) or not isinstance(b, _TENSORS):
        return None
    if isinstance(dims, _TENSORS):  # numbers that a checkpoint may hold when they are needed
        return None
    if isinstance(dims, int):
        dims = (range(a.dim() - dims, a.dim()), range(dims))
    of_a: list[Hashable] = [("i", k) for k in range(a.dim())]
    of_b: list[Hashable] = [("j", k) for k in range(b.dim())]
    for k, (first, second) in enumerate(zip(*([d] if isinstance(d, int) else d for d in dims), strict=True)):
        of_a[first] = of_b[second] = ("k", k)
    output = tuple(label for label in of_a + of_b if not isinstance(label, tuple) or label[0] != "k")
    return _pair(operands, slot, ("a", "b"), (tuple(of_a), tuple(of_b)), output)


def _bilinear(operands: Mapping[str, Any], slot: str) -> Product | None:
    x, y = operands["input1"], operands["input2"]
    leading = _batch(x.dim() - 1)
    return Product(("o", "i", "j"), ((x, (*leading, "i")), (y, (*leading, "j"))), (*leading, "o"))


def _einsum(operands: Mapping[str, Any], slot: str) -> Product | None:
    equation = operands.get("equation")
    if not isinstance(equation, str):
        return None
    tensors = [operands[name] for name in _FACTORS if name in operands]
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if len(terms) != len(tensors) or not all(isinstance(t, _TENSORS) for t in tensors):
        return None
    letters = left.replace(",", "").replace(".", "")
    extra = [t.dim() - len(term.replace(_ELLIPSIS, "")) for t, term in zip(tensors, terms, strict=True)]
    if any(count < 0 or (count and _ELLIPSIS not in term) for count, term in zip(extra, terms, strict=True)):
        return None
    if not arrow:  # the ellipsis, then letters that occur once, in alphabetical order
        right = (_ELLIPSIS if "." in left else "") + "".join(sorted(c for c in set(letters) if letters.count(c) == 1))
    labelled = [_spelt(term, count) for term, count in zip(terms, extra, strict=True)]
    own = [name for name in _FACTORS if name in operands].index(slot)
    others = tuple((tensors[k], labelled[k]) for k in range(len(tensors)) if k != own)
    return Product(labelled[own], others, _spelt(right, max(extra))) if others else None


def _spelt(term: str, extra: int) -> Labels:
    """The labels of an einsum term whose ellipsis stands for `extra` axes."""
    before, dots, after = term.partition(_ELLIPSIS)
    return (*before, *(_batch(extra) if dots else ()), *after)


_FACTORS = tuple(f"factor_{k}" for k in range(8))


def _register(names: str, operands: str, read: Reader, factors: str) -> None:
    """Register functions of torch and the methods of the same names; an operand that is no factor is added."""
    found = [getattr(owner, n) for n in names.split() for owner in (torch, torch.Tensor) if hasattr(owner, n)]
    order = tuple(operands.split())
    rules: dict[str, Rule] = {name: Contraction(read) for name in factors.split()}
    if "input" in order and "input" not in rules:
        rules["input"] = BroadcastAdd("input", scale="beta")
    register_rule(found, order, rules)


def _register_all() -> None:
    for names, operands in (
        ("matmul __matmul__", "input other"),
        ("mm bmm", "input mat2"),
        ("mv", "input vec"),
        ("dot", "input tensor"),
    ):
        left, right = operands.split()
        _register(names, operands, _matmul(left, right), operands)
    _register("__rmatmul__", "input other", _matmul("other", "input"), "input other")
    _register("inner", "input other", _inner, "input other")
    _register("outer ger", "input vec2", _outer("input", "vec2"), "input vec2")
    _register("addmm addmm_", "input mat1 mat2", _matmul("mat1", "mat2"), "mat1 mat2")
    _register("addmv addmv_", "input mat vec", _matmul("mat", "vec"), "mat vec")
    _register("baddbmm baddbmm_", "input batch1 batch2", _matmul("batch1", "batch2"), "batch1 batch2")
    _register("addbmm addbmm_", "input batch1 batch2", _matmul("batch1", "batch2", summed_batch=True), "batch1 batch2")
    _register("addr addr_", "input vec1 vec2", _outer("vec1", "vec2"), "vec1 vec2")
    _register("tensordot", "a b dims", _tensordot, "a b")
    _register("einsum", " ".join(("equation", *_FACTORS)), _einsum, " ".join(_FACTORS))
    pair = Contraction(_matmul("input", "other"))
    register_rule(torch.linalg.matmul, ("input", "other"), {"input": pair, "other": pair})


register_rule(
    F.linear,
    ("input", "weight", "bias"),
    {"input": Contraction(_linear), "weight": LinearWeight(), "bias": BroadcastAdd()},
)
register_rule(
    F.bilinear, ("input1", "input2", "weight", "bias"), {"weight": Contraction(_bilinear), "bias": BroadcastAdd()}
)
_register_all()
