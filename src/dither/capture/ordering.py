"""Whether the same operations put the same rows in the same places: what was proved of their order then still holds.

Operations are the same if they are given the same options and the results of the same operations before them, all of
the same shapes. Where what a tensor holds (an index, a sparse matrix) decides about rows, nothing says so.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dither.capture.custom import OWN
from dither.capture.operations import name_of, parts_of, place_of, shape_of

_REORDERING = {
    "_pack_padded_sequence",
    "_pad_packed_sequence",
    "embedding",
    "flip",
    "gather",
    "index_add",
    "index_copy",
    "index_put",
    "index_reduce",
    "index_select",
    "masked_scatter",
    "masked_select",
    "put",
    "repeat_interleave",
    "roll",
    "scatter",
    "scatter_add",
    "scatter_reduce",
    "sort",
    "take",
    "take_along_dim",
    "topk",
    "unique",
}
"""Functions that pick rows by what they are given."""

_KEEPING = {
    "add", "addcdiv", "addcmul", "atan2", "binary_cross_entropy", "binary_cross_entropy_with_logits",
    "broadcast_tensors", "cat", "clamp", "clamp_max", "clamp_min", "clip", "concat", "concatenate", "copy",
    "copysign", "cross_entropy", "div", "divide", "eq", "equal", "expand_as", "float_power", "floor_divide",
    "floordiv", "fmod", "ge", "greater", "greater_equal", "gt", "hypot", "isclose", "kl_div", "ldexp", "le",
    "lerp", "less", "less_equal", "logical_and", "logical_or", "logical_xor", "lt", "masked_fill", "maximum",
    "minimum", "mod", "mul", "multi_head_attention_forward", "multiply", "nan_to_num", "ne", "not_equal", "pow",
    "radd", "rdiv", "remainder", "reshape_as", "rfloordiv", "rmod", "rmul", "rpow", "rsub", "rtruediv",
    "scaled_dot_product_attention", "stack", "sub", "subtract", "to", "true_divide", "truediv", "type_as",
    "view_as", "where", "xlogy",
}  # fmt: skip
"""Functions that leave every row where it is, whatever integers or masks they are given; losses too."""


Number = str
"""Which tensor of a recording; no integer, which could be an option of an operation, or a size."""


class Numbers:
    """Numbers tensors in the order in which operations are given them and return them.

    The same operations on the same tensors so give the same numbers.

    Attributes:
        shapes: of every tensor, in that order.
        began: sequence number of the recording's first graph node.
        unseen: whether a tensor came out of operations of this recording that nobody saw (a scripted function): of
            these nothing says that they are the same.
    """

    def __init__(self) -> None:
        self._known: dict[int, tuple[weakref.ref[Tensor], Number]] = {}
        self._next = 0
        self.shapes: list[torch.Size | None] = []
        self.began = 0
        self.unseen = False

    def of(self, tensor: Tensor) -> Number:
        """A tensor's number; a new one at first sight."""
        number = self.known(tensor)
        if number is not None:
            return number
        node = tensor.grad_fn
        if node is not None and node._sequence_nr() >= self.began and node.name() != OWN:
            self.unseen = True
        return self.give(tensor)

    def known(self, tensor: Tensor) -> Number | None:
        """A tensor's number, if an operation was given it or returned it."""
        found = self._known.get(id(tensor))
        return found[1] if found is not None and found[0]() is tensor else None

    def give(self, tensor: Tensor) -> Number:
        """A new number: it is an operation's result."""
        self._next += 1
        number = f"tensor {self._next}"
        self._known[id(tensor)] = (weakref.ref(tensor), number)
        self.shapes.append(shape_of(tensor))
        return number

    def options_of(self, tree: Any) -> Any:
        """Arguments as something hashable: tensors by their numbers, the rest as it is.

        Of Python's hashes, those of -1 and -2, and of 1, 1.0 and True, are the same: they are told apart.
        """
        kind = type(tree)
        if kind in _PLAIN:
            return tree
        if kind is int:
            return "-1" if tree == -1 else tree
        if kind is bool:
            return ("bool", tree)
        if kind is slice:
            return ("slice", *[self.options_of(end) for end in (tree.start, tree.stop, tree.step)])
        if isinstance(tree, Tensor):
            return self.of(tree)
        if isinstance(tree, (list, tuple)):
            if len(tree) > 1 and _are_tensors(tree):  # rows, perhaps, of the same memory
                return tuple([(self.of(item), place_of(item)) for item in tree])
            return tuple([self.options_of(item) for item in tree])
        if isinstance(tree, dict):
            return tuple([(key, self.options_of(item)) for key, item in tree.items()])
        if isinstance(tree, (np.integer, np.bool_)):
            return self.options_of(tree.item())
        return tree if isinstance(tree, _OPTIONS) else kind


_OPTIONS = (int, float, str, torch.dtype)
_PLAIN = frozenset({float, str, torch.dtype, type(None), type(Ellipsis)})


def _are_tensors(items: Sequence[Any]) -> bool:
    """Whether every item is a tensor; most lists say so at once."""
    return isinstance(items[0], Tensor) and all(isinstance(item, Tensor) for item in items)


@lru_cache(maxsize=4096)
def _is_listed(name: str) -> bool:
    return name.removesuffix("_") in _REORDERING


@lru_cache(maxsize=4096)
def _keeps(name: str) -> bool:
    plain = name.strip("_")
    return plain in _KEEPING or plain.endswith("_loss") or (name.startswith("__i") and plain[1:] in _KEEPING)


def reordered(function: Any, args: Any, kwargs: Any, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """The tensors whose rows the function may pick by what a tensor, a list or an array holds; none for most.

    Args:
        function: of torch.
        args: of its call.
        kwargs: likewise.
        tensors: all that are among these.
    """
    name = name_of(function)
    if name in ("__getitem__", "__setitem__"):
        return tensors if any(_chooses(part) for part in parts_of(args[1])) else ()
    if _keeps(name):
        return ()
    if name == "repeat_interleave" and len(tensors) == 1:  # by a number, which is in the options
        return ()
    return tensors if _is_listed(name) or any(_may_say_where(tensor) for tensor in tensors) else ()


def says_nothing(tree: Any) -> bool:
    """Whether an object is among arguments of which `options_of` says no more than its type."""
    if isinstance(tree, (list, tuple)):
        return any(says_nothing(item) for item in tree)
    if isinstance(tree, dict):
        return any(says_nothing(item) for item in tree.values())
    return not (tree is None or isinstance(tree, (Tensor, np.integer, np.bool_, torch.device, *_OPTIONS)))


def _may_say_where(tensor: Tensor) -> bool:
    """Whether an operation may move other tensors' rows by what this one holds."""
    return not (tensor.is_floating_point() or tensor.is_complex()) or tensor.layout != torch.strided


def _chooses(part: Any) -> bool:
    if isinstance(part, slice):
        return any(isinstance(end, Tensor) for end in (part.start, part.stop, part.step))
    return not (part is None or part is Ellipsis or isinstance(part, int))
