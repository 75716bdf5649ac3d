"""Every rule as a small model: one line of registration per case, run by the conformance suite in every strategy.

A case is a function of a seeded generator that returns (model, inputs); the model returns per-example outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
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


# linear
case("linear", lambda: nn.Linear(5, 3), normal(B, 5))
case("linear 3-D", lambda: nn.Linear(5, 3), normal(B, 7, 5))
case("linear 4-D", lambda: nn.Linear(5, 3, bias=False), normal(B, 2, 6, 5))
case("linear, T equals B", lambda: nn.Linear(5, 3), normal(B, B, 5))
case("linear, time first", lambda: TimeFirst(nn.Linear(5, 3)), normal(B, 6, 5))
case("linear, time first, T equals B", lambda: TimeFirst(nn.Linear(5, 3)), normal(B, B, 5))
case("linear, rows batch-major", lambda: Rows(nn.Linear(5, 3), minor=False), normal(B, 6, 5))
case("linear, rows batch-minor", lambda: Rows(nn.Linear(5, 3), minor=True), normal(B, 6, 5))
case("linear, rows batch-minor, T equals B", lambda: Rows(nn.Linear(5, 3), minor=True), normal(B, B, 5))
case("linear, twice", lambda: nn.Sequential(shared := nn.Linear(5, 5), nn.Tanh(), shared), normal(B, 3, 5))
case(
    "linear, in place after",
    lambda: nn.Sequential(nn.Linear(5, 6), nn.ReLU(inplace=True), nn.Linear(6, 3)),
    normal(B, 5),
)
function("x @ w", lambda x, w: x @ w, normal(B, 6, 5), w=(5, 3))
function("mm", lambda x, w: torch.mm(x, w), normal(B, 5), w=(5, 3))
function("w @ x", lambda x, w: w @ x, normal(B, 5, 6), w=(3, 5))
function("batched matmul", lambda x, w: torch.matmul(x, w), normal(B, 2, 6, 5), w=(2, 5, 3))
function(
    "bmm over rows of heads", lambda x, w: torch.bmm(x.transpose(0, 1), w).transpose(0, 1), normal(B, 2, 5), w=(2, 5, 3)
)
function("einsum", lambda x, w: torch.einsum("bthd,hdp->bthp", x, w), normal(B, 3, 2, 5), w=(2, 5, 4))
function("addmm", lambda x, b, w: torch.addmm(b, x, w), normal(B, 5), b=(3,), w=(5, 3))
function("weight used as module and function", lambda x, w: F.linear(F.linear(x, w), w.T), normal(B, 2, 5), w=(3, 5))

# convolution
for dims, conv, size in ((1, nn.Conv1d, (9,)), (2, nn.Conv2d, (7, 8)), (3, nn.Conv3d, (5, 4, 6))):
    for label, options in {
        "plain": {},
        "stride": {"stride": 2},
        "padding": {"padding": 1},
        "dilation": {"dilation": 2, "padding": 2},
        "groups": {"groups": 2},
        "depthwise": {"groups": 4, "bias": False},
        "same": {"padding": "same"},
        "reflect": {"padding": 1, "padding_mode": "reflect"},
        "all": {"stride": 2, "padding": 2, "dilation": 2, "groups": 2},
    }.items():
        case(
            f"conv{dims}d {label}",
            lambda c=conv, o=options: c(4, 8, 3 if "dilation" not in o else 2, **o),
            normal(B, 4, *size),
        )
case(
    "conv2d channels_last",
    lambda: nn.Conv2d(4, 6, 3),
    lambda: torch.randn(B, 4, 6, 6).to(memory_format=torch.channels_last),
)
case("conv2d, k rows", lambda: Frames(nn.Conv2d(3, 4, 3)), normal(B, 3, 3, 6, 6))


class Frames(nn.Module):
    """(B, k, C, H, W) flattened into B * k images."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.flatten(0, 1)).unflatten(0, x.shape[:2])


# embedding
case("embedding", lambda: nn.Embedding(6, 3), ids(6, B))
case("embedding 2-D", lambda: nn.Embedding(6, 3), ids(6, B, 5))
case("embedding 3-D", lambda: nn.Embedding(6, 3), ids(6, B, 2, 5))
case("embedding padding", lambda: nn.Embedding(6, 3, padding_idx=2), ids(6, B, 5))
case("embedding padding from the end", lambda: nn.Embedding(6, 3, padding_idx=-1), ids(6, B, 5))
case("embedding, time first", lambda: TimeFirst(nn.Embedding(6, 3)), ids(6, B, B))
function("tied table", lambda i, w: F.embedding(i, w) @ w.T, ids(6, B, 5), w=(6, 3))

# normalisation
case("layer norm", lambda: nn.LayerNorm(5), normal(B, 6, 5))
case("layer norm 2-D", lambda: nn.LayerNorm((6, 5)), normal(B, 6, 5))
case("group norm", lambda: nn.GroupNorm(2, 4), normal(B, 4, 5, 5))
case("group norm, no space", lambda: nn.GroupNorm(2, 4), normal(B, 4))
case("rms norm", lambda: nn.RMSNorm(5), normal(B, 6, 5))
case("instance norm", lambda: nn.InstanceNorm2d(4, affine=True), normal(B, 4, 5, 5))
case("batch norm in eval", lambda: nn.BatchNorm2d(4).eval(), normal(B, 4, 5, 5))

# elementwise
function("add", lambda x, p: x + p, normal(B, 6, 5), p=(5,))
function("add, reversed", lambda x, p: p + x, normal(B, 6, 5), p=(1, 6, 1))
function("add, scaled", lambda x, p: torch.add(x, p, alpha=3), normal(B, 5), p=(5,))
function("add, a place for each example", lambda x, p: x + p, normal(B, 5), p=(B, 5))
function("sub", lambda x, p: x - p, normal(B, 6, 5), p=(6, 5))
function("sub, reversed", lambda x, p: p - x, normal(B, 6, 5), p=(6, 1))
function("mul", lambda x, p: x * p, normal(B, 6, 5), p=(6, 1))
function("mul by a scalar", lambda x, p: p * x, normal(B, 6, 5), p=())
function("div", lambda x, p: x / (p * p + 1), normal(B, 6, 5), p=(5,))
function("div, reversed", lambda x, p: p / (x * x + 1), normal(B, 6, 5), p=(5,))
function("in-place add", lambda x, p: (x * 1).add_(p), normal(B, 6, 5), p=(5,))
function("in-place mul", lambda x, p: (x * 2).mul_(p), normal(B, 6, 5), p=(5,))
function("operator in place", lambda x, p: _imul(x * 2, p), normal(B, 6, 5), p=(5,))
function("position table, T equals B", lambda x, p: x + p, normal(B, B, 5), p=(B, 5))


def _imul(x: Tensor, p: Tensor) -> Tensor:
    x *= p
    x += p
    return x


# parameter-only subgraphs
function("expand and cat", lambda x, c: torch.cat([c.expand(x.shape[0], -1, -1), x], 1), normal(B, 3, 5), c=(1, 2, 5))
function("slice", lambda x, p: x + p[:3] * p[3:], normal(B, 3, 5), p=(6, 5))
function("low rank", lambda x, w, a, b: F.linear(x, w + b @ a), normal(B, 4, 5), w=(3, 5), a=(2, 5), b=(3, 2))
function(
    "weight norm", lambda x, v, g: F.linear(x, g * v / v.norm(dim=1, keepdim=True)), normal(B, 5), v=(3, 5), g=(3, 1)
)
function("cat of weights", lambda x, q, k: F.linear(x, torch.cat([q, k])), normal(B, 3, 5), q=(2, 5), k=(3, 5))
function("transposed weight", lambda x, w: F.linear(x, w.t()), normal(B, 3, 5), w=(5, 4))
function("constant ids", lambda x, w: x + F.embedding(torch.arange(x.shape[1]), w), normal(B, 3, 5), w=(7, 5))
function(
    "constant ids, T equals B", lambda x, w: x + F.embedding(torch.arange(x.shape[1]), w), normal(B, B, 5), w=(7, 5)
)

# no rule: the fallback
function("prelu", lambda x, w: F.prelu(x, w), normal(B, 5, 4), w=(5,))
function("where", lambda x, p: torch.where(x > 0, x, p), normal(B, 6, 5), p=(5,))
function("indexing by data", lambda i, p: p[i], ids(6, B, 3), p=(6, 5))
function("lerp", lambda x, p: torch.lerp(x, x * x, p), normal(B, 5), p=(5,))
case("bilinear", lambda: nn.Bilinear(4, 3, 5), normal(B, 4), normal(B, 3))
case("transposed convolution", lambda: nn.ConvTranspose2d(3, 4, 3, stride=2), normal(B, 3, 4, 4))
case("attention with dropout", lambda: Attend(dropout=0.4), normal(B, 5, 4))
case("attention, time first, T equals B", lambda: Attend(batch_first=False), normal(B, B, 4))
case("encoder layer", lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout=0.3, batch_first=True), normal(B, 5, 4))


class Attend(nn.Module):
    """Packed multi-head attention."""

    def __init__(self, dropout: float = 0.0, batch_first: bool = True) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.inner = nn.MultiheadAttention(4, 2, dropout=dropout, batch_first=batch_first)

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.batch_first else x.transpose(0, 1)
        y, _ = self.inner(x, x, x, need_weights=False)
        return y if self.batch_first else y.transpose(0, 1)
