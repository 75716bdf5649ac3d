"""Where a traced graph may be cut: runs of operations without parameters between those that take them.

Only an operation that is known to return what it computes, and to do nothing else, goes into a run: its ATen
operations, seen on fake tensors, write nothing, draw nothing and have sizes that no data decide. The rest stays as it
is.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator, OpOverload
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule, Node
from torch.fx._lazy_graph_module import _LazyGraphModule
from torch.fx.passes.split_module import split_module
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode

from dither.capture import operations
from dither.capture.ordering import reordered
from dither.capture.uses import tensors_in
from dither.errors import CaptureError

_FEWEST = 2
"""Operations that compute, in a run that is compiled: one alone is a kernel of torch's already."""

_IN_PLACE = {function for name, function in vars(operator).items() if operations.is_in_place(name)}
_IMPURE = (torch.Tag.nondeterministic_seeded, torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output)


class NotSplitError(Exception):
    """A graph has something that this module does not cut around."""


@dataclass(frozen=True)
class Segment:
    """A run of operations to be compiled.

    Attributes:
        name: of the submodule that runs it.
        symbolic: whether a size of its inputs is a symbol.
        static: for each of its inputs, which axes have a size that is fixed; None for a number.
        behind: for each output, the positions of the tensors that it is computed from.
    """

    name: str
    symbolic: bool
    static: tuple[tuple[int, ...] | None, ...]
    behind: tuple[frozenset[int], ...]


def split(graph: GraphModule) -> tuple[GraphModule, list[Segment]]:
    """Cut a graph of Dynamo's into submodules, in its own order.

    Args:
        graph: every node has its fake value.

    Returns:
        The graph of submodules, and those of them that may be compiled.

    Raises:
        NotSplitError: the graph has nodes of another kind than torch's functions, or nothing is worth compiling.
    """
    kinds = _kinds(graph)
    runs, chosen = _runs(kinds)
    if not chosen:
        raise NotSplitError("no two operations without parameters follow each other")
    whole = split_module(graph, graph, lambda node: runs[node], keep_original_order=True)
    for part in whole.modules():  # else its code is written, and traced, at the first call
        if isinstance(part, GraphModule):
            _LazyGraphModule.force_recompile(part)
    found = []
    for number in chosen:
        name = f"submod_{number}"
        segment = _segment(name, getattr(whole, name))
        if segment is not None:
            found.append(segment)
    return whole, found


@dataclass(frozen=True)
class _Kind:
    free: bool
    computes: bool


def _kinds(graph: GraphModule) -> dict[Node, _Kind]:
    """For each operation: whether it may go into a run, and whether it does more than view."""
    kinds: dict[Node, _Kind] = {}
    roots: set[Node] = set()
    data: set[Node] = set()
    for node in graph.graph.nodes:
        if node.op == "output":
            continue
        if node.op == "placeholder":
            if isinstance(_value(node), Parameter):
                roots.add(node)
            elif isinstance(_value(node), Tensor):
                data.add(node)
            continue
        _refuse(node)
        inputs = node.all_input_nodes
        if any(i in data for i in inputs):
            data.add(node)
        elif any(i in roots for i in inputs):
            roots.add(node)
        free = not any(i in roots for i in inputs) and any(i in data for i in inputs)
        free = free and (not _holds_tuple(inputs) or all(kinds[i].free for i in inputs if i in kinds))
        ops = _operations(node) if free else None
        kinds[node] = _Kind(ops is not None, bool(ops) and not all(op.is_view for op in ops or ()))
    return kinds


def _refuse(node: Node) -> None:
    target = node.target
    of_functorch = str(getattr(target, "__module__", "")).startswith(("torch._functorch", "torch._C._functorch"))
    if node.op not in ("call_function", "call_method") or isinstance(target, HigherOrderOperator) or of_functorch:
        raise NotSplitError(f"{node.op} {target}")
    if target in _IN_PLACE or operations.is_in_place(target if isinstance(target, str) else operations.name_of(target)):
        raise NotSplitError(f"{target} changes a tensor in place")
    value = _value(node)
    if not isinstance(value, (Tensor, int, float, torch.SymInt, torch.SymFloat, torch.SymBool, tuple, list)):
        raise NotSplitError(f"{target} returns {type(value).__name__}")


def _value(node: Node) -> Any:
    return node.meta.get("example_value")


def _holds_tuple(nodes: Iterable[Node]) -> bool:
    return any(isinstance(_value(node), (tuple, list)) for node in nodes)


class _Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations: list[OpOverload] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace != "prim":  # which asks for a tensor's device
            self.operations.append(func)
        return func(*args, **(kwargs or {}))


def _operations(node: Node) -> list[OpOverload] | None:
    """The ATen operations of a node; None if it may do more than return what it computes."""
    function: Any = getattr(Tensor, str(node.target), None) if node.op == "call_method" else node.target
    value = _value(node)
    tensors = value if isinstance(value, (tuple, list)) else [value]
    if function is None or not tensors or not all(isinstance(tensor, FakeTensor) for tensor in tensors):
        return None
    name = operations.name_of(function)
    if function in operations.BACKWARD or function in operations.LEAVES_TORCH or operations.draws(name):
        return None
    args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), _value)
    seen = _Seen()
    try:
        operations.refuse_batch_statistics(function, args, kwargs)
        called = Tensor.__getitem__ if name == "getitem" else function
        if reordered(called, args, kwargs, tensors_in(args, kwargs)):
            return None
        with tensors[0].fake_mode, seen:
            function(*args, **kwargs)
    except (CaptureError, RuntimeError, TypeError, ValueError, NotImplementedError):
        return None  # as written it raises this where people look for it
    if any(operation._schema.is_mutable for operation in seen.operations):
        raise NotSplitError(f"{name} changes a tensor in place")
    return seen.operations if all(map(_is_pure, seen.operations)) else None


def _is_pure(operation: OpOverload) -> bool:
    return operation.namespace in ("aten", "prims") and not any(tag in operation.tags for tag in _IMPURE)


def _runs(kinds: dict[Node, _Kind]) -> tuple[dict[Node, int], list[int]]:
    """Number the runs of neighbours of one kind; and say which are worth compiling.

    Views of what comes from outside stay outside if somebody else needs them too.
    """
    runs: dict[Node, int] = {}
    chosen: list[int] = []
    groups: list[tuple[bool, list[Node]]] = []
    for node, kind in kinds.items():
        if not groups or groups[-1][0] != kind.free:
            groups.append((kind.free, []))
        groups[-1][1].append(node)
    number = 0
    for free, group in groups:
        outside = _views_for_others(group, kinds) if free else set()
        rest = [node for node in group if node not in outside]
        before = [node for node in group if node in outside]
        for node in before if rest else ():
            rest[0].prepend(node)
        for part in (before, rest):
            if not part:
                continue
            runs |= dict.fromkeys(part, number)
            if free and part is rest and sum(kinds[node].computes for node in part) >= _FEWEST:
                chosen.append(number)
            number += 1
    return runs, chosen


def _views_for_others(group: list[Node], kinds: dict[Node, _Kind]) -> set[Node]:
    inside, views = set(group), set()
    for node in group:
        if not kinds[node].computes and all(i in views or i not in inside for i in node.all_input_nodes):
            views.add(node)
    return views if any(user not in inside for node in views for user in node.users) else set()


def _segment(name: str, module: GraphModule) -> Segment | None:
    """What must be known to run it; None if something else than tensors and numbers goes in or out."""
    static: list[tuple[int, ...] | None] = []
    behind: dict[Node, frozenset[int]] = {}
    symbolic = False
    for node in module.graph.nodes:
        if node.op == "output":
            outputs = node.args[0] if isinstance(node.args[0], (tuple, list)) else (node.args[0],)
            if not all(isinstance(_value(output), Tensor) for output in outputs):
                return None
            return Segment(name, symbolic, tuple(static), tuple(behind[output] for output in outputs))
        if node.op != "placeholder":
            behind[node] = frozenset().union(*(behind[i] for i in node.all_input_nodes))
            continue
        value, position = _value(node), len(static)
        if isinstance(value, Tensor):
            static.append(tuple(axis for axis, size in enumerate(value.shape) if isinstance(size, int)))
            symbolic |= len(static[-1] or ()) < value.dim()
            behind[node] = frozenset([position])
        elif isinstance(value, (int, torch.SymInt)):
            static.append(None)
            symbolic |= isinstance(value, torch.SymInt)
            behind[node] = frozenset()
        else:
            return None
    raise AssertionError("a graph without an output")
