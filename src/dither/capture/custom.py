"""Custom autograd functions that were given a parameter: their graph nodes stand for operations.

No torch function shows a `torch.autograd.Function` (or a C++ extension's) to the recorder. Its node in the graph does:
it has an edge to the parameter, receives the output gradients, and can be asked for each example's gradient.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from dither.capture.uses import Hidden, OpCall, ParamUse, Tape

OWN = "_AnchorBackward"
"""Name of the graph nodes that dither itself puts behind fresh outputs."""

_OPERATION = re.compile(r"Backward\d+$|^AccumulateGrad$")
"""Names of the graph nodes' types that torch generates for its own operations."""


class CustomNodes:
    """Finds the nodes, and puts their uses on a tape.

    Args:
        tape: where the uses go.
        rule: the rule of such a use.
        since: sequence number of the first node of this recording; older ones are stale.
        anchor: the leaf behind everything that this recording records.
        targets: finds, by node (a parameter's or a computed tensor's), the tensor and its name.
    """

    def __init__(
        self,
        tape: Tape,
        rule: Any,
        since: int,
        anchor: Tensor,
        targets: Callable[[], Mapping[Any, tuple[Tensor, str]]],
    ) -> None:
        self.anchor = anchor
        self._find_targets = targets
        self._tape, self._rule, self._since = tape, rule, since
        self._adopted: set[Any] = set()

    @cached_property
    def targets(self) -> Mapping[Any, tuple[Tensor, str]]:
        """By graph node, parameters and tensors computed from them, with their names."""
        return self._find_targets()

    def adopt(self, node: Any) -> set[int]:
        """Put a node's uses on the tape, if it is a custom function's.

        Returns:
            Positions of the edges that are now accounted for.
        """
        if not is_custom(node) or node._sequence_nr() < self._since:
            return set()
        edges = [i for i, (parent, _) in enumerate(node.next_functions) if parent in self.targets]
        if not edges:
            return set()
        calls = []
        for output, metadata in enumerate(node._input_metadata):
            call = OpCall(
                index=len(self._tape.calls),
                function=type(node),
                args=(),
                kwargs={},
                operands={},
                output_shape=torch.Size(metadata.shape),
                versions=(),
                output=output,
                hidden=((Hidden(0, torch.Size()),), {}, {}),
            )
            self._tape.calls.append(call)
            calls.append(call.index)
            for edge in edges:
                tensor, name = self.targets[node.next_functions[edge][0]]
                self._tape.uses.append(ParamUse(call, edge, tensor, name, self._rule))
        _listen(node, calls, self._tape.deliver)
        return set(edges)


def is_custom(node: Any) -> bool:
    """Whether a graph node is a custom autograd function's, and none of dither's own."""
    if _OPERATION.search(type(node).__name__) and not isinstance(node, BackwardCFunction):
        return False
    name: str = node.name()
    if isinstance(node, BackwardCFunction):
        return name != OWN
    return "CppNode" in name


def _listen(node: Any, calls: Iterable[int], deliver: Callable[[int, Any, Tensor], None]) -> None:
    found = weakref.ref(node)
    calls = list(calls)

    def hook(gradients: tuple[Tensor | None, ...]) -> None:
        for call, gradient in zip(calls, gradients, strict=False):
            if gradient is not None:
                deliver(call, lambda: (found(),), gradient)

    node.register_prehook(hook)
