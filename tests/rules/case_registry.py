"""Registration of the conformance suite's cases.

A case is a function of a seeded generator that returns (model, inputs); the model returns per-example outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

B = 4
Case = Callable[[], tuple[nn.Module, tuple[Any, ...]]]
CASES: dict[str, Case] = {}


class Function(nn.Module):
    """A model of named parameters and a function of them."""

    def __init__(self, function: Callable[..., Tensor], **shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.function = function
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape)))

    def forward(self, *inputs: Any) -> Tensor:
        return self.function(*inputs, **dict(self.named_parameters()))


def case(name: str, model: Callable[[], nn.Module], *inputs: Callable[[], Any]) -> None:
    """Register a case."""
    CASES[name] = lambda: (model(), tuple(make() for make in inputs))


def function(name: str, body: Callable[..., Tensor], *inputs: Callable[[], Any], **shapes: tuple[int, ...]) -> None:
    """Register a case of raw parameters."""
    case(name, lambda: Function(body, **shapes), *inputs)


def normal(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(shape)


def ids(high: int, *shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randint(high, shape)


class TimeFirst(nn.Module):
    """A module whose rows are (T, B, d)."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.transpose(0, 1)).transpose(0, 1)


class Rows(nn.Module):
    """A module that sees flattened rows, batch-major or batch-minor."""

    def __init__(self, inner: nn.Module, minor: bool) -> None:
        super().__init__()
        self.inner, self.minor = inner, minor

    def forward(self, x: Tensor) -> Tensor:
        if self.minor:
            x = x.transpose(0, 1)
        y = self.inner(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], -1)
        return y.transpose(0, 1) if self.minor else y
