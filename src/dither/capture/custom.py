"""Custom autograd functions that were given a parameter: their graph nodes stand for operations.

No torch function shows a `torch.autograd.Function` (or a C++ extension's) to the recorder. Its node in the graph does:
it has an edge to the parameter, receives the output gradients, and can be asked for each example's gradient.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from dither.capture.uses import Hidden, OpCall, ParamUse, Tape


class CustomNodes:
    """Finds the nodes, and puts their uses on a tape.

    Args:
        tape: where the uses go.
        rule: the rule of such a use.
        since: sequence number of the first node of this recording; older ones are stale.
        anchor: the leaf behind everything that this recording records.
    """

    def __init__(self, tape: Tape, rule: Any, since: int, anchor: Tensor) -> None:
        self.anchor = anchor
        self._tape, self._rule, self._since = tape, rule, since
        self._adopted: set[Any] = set()

    def adopt(self, node: Any, targets: Mapping[Any, tuple[Tensor, str]]) -> set[int]:
        """Put a node's uses on the tape, if it is a custom function's.

        Args:
            node: a node of the graph.
            targets: by node (a parameter's or a computed tensor's), the tensor and its name.

        Returns:
            Positions of the edges that are now accounted for.
        """
        edges = [i for i, (parent, _) in enumerate(node.next_functions) if parent in targets]
        if not edges or not _is_custom(node) or node._sequence_nr() < self._since:
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
                tensor, name = targets[node.next_functions[edge][0]]
                self._tape.uses.append(ParamUse(call, edge, tensor, name, self._rule))
        _listen(node, calls, self._tape.deliver)
        return set(edges)


def _is_custom(node: Any) -> bool:
    return isinstance(node, BackwardCFunction) or "CppNode" in node.name()


def _listen(node: Any, calls: Iterable[int], deliver: Callable[[int, Any, Tensor], None]) -> None:
    found = weakref.ref(node)
    calls = list(calls)

    def hook(gradients: tuple[Tensor | None, ...]) -> None:
        for call, gradient in zip(calls, gradients, strict=False):
            if gradient is not None:
                deliver(call, lambda: (found(),), gradient)

    node.register_prehook(hook)
