"""Parameters used entry by entry, and normalisation layers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from case_registry import B, TimeFirst, case, function, normal

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

# normalisation, more of it
case("instance norm 1-D", lambda: nn.InstanceNorm1d(4, affine=True), normal(B, 4, 5))
case("instance norm 3-D", lambda: nn.InstanceNorm3d(4, affine=True, eps=1e-2), normal(B, 4, 3, 2, 3))
case("instance norm, channels equal B", lambda: nn.InstanceNorm1d(B, affine=True), normal(B, B, B))
case(
    "instance norm with running statistics in eval",
    lambda: nn.InstanceNorm1d(4, affine=True, track_running_stats=True).eval(),
    normal(B, 4, 5),
)
case("batch norm in eval, no space", lambda: nn.BatchNorm1d(4, eps=1e-2).eval(), normal(B, 4))
case("batch norm in eval, moved statistics", lambda: moved_statistics(nn.BatchNorm1d(B)).eval(), normal(B, B, 5))
case("group norm, k rows", lambda: Frames(nn.GroupNorm(2, 4)), normal(B, 3, 4, 5))
function("torch.layer_norm", lambda x, w, b: torch.layer_norm(x, (5,), w, b), normal(B, 6, 5), w=(5,), b=(5,))
function("torch.group_norm", lambda x, w, b: torch.group_norm(x, 2, w, b), normal(B, 4, 5), w=(4,), b=(4,))
function(
    "layer norm by keyword",
    lambda x, w, b: F.layer_norm(normalized_shape=(5,), input=x, bias=b, weight=w, eps=1e-2),
    normal(B, 6, 5),
    w=(5,),
    b=(5,),
)
case(
    "local response norm after conv",
    lambda: nn.Sequential(nn.Conv1d(3, 4, 2), nn.LocalResponseNorm(2)),
    normal(B, 3, 5),
)

function(
    "group norm, examples on the channel axis",
    lambda x, w: F.group_norm(x.unsqueeze(0), B, w)[0],
    normal(B, 5),
    w=(B,),
)

# activations
function("prelu", lambda x, w: F.prelu(x, w), normal(B, 5, 4), w=(5,))
case("prelu, one slope", lambda: nn.PReLU(), normal(B, 7, 5))
case("prelu, two axes", lambda: nn.PReLU(5), normal(B, 5))
case(
    "prelu, one axis",
    lambda: nn.Sequential(nn.Flatten(0), nn.PReLU(), nn.Unflatten(0, (B, 1)), nn.Linear(1, 2)),
    normal(B),
)
case("prelu, channels equal B", lambda: nn.PReLU(B), normal(B, B, B))
case("prelu, time first", lambda: TimeFirst(nn.PReLU()), normal(B, B, 5))
case("prelu, time first, a slope for each example", lambda: TimeFirst(nn.PReLU(B)), normal(B, B, 5))
case("prelu, k rows", lambda: Frames(nn.PReLU(4)), normal(B, 3, 4, 5))
function("prelu, method", lambda x, w: x.prelu(w), normal(B, 5, 4), w=(5,))
case(
    "glu after linear",
    lambda: nn.Sequential(nn.Linear(5, 6), nn.GLU(), nn.Unflatten(1, (3, 1)), nn.RReLU()),
    normal(B, 5),
)
case(
    "random leaky relu in place",
    lambda: nn.Sequential(nn.Linear(5, 6), nn.RReLU(inplace=True), nn.Dropout(0.5)),
    normal(B, 5),
)

function("prelu, examples on the channel axis", lambda x, w: F.prelu(x.unsqueeze(0), w)[0], normal(B, 5), w=(B,))

# elementwise, more of it
function("add, scaled parameter", lambda x, p: x.add(p, alpha=-0.5), normal(B, 6, 5), p=(5,))
function("add to a parameter, scaled", lambda x, p: torch.add(p, x, alpha=2), normal(B, 6, 5), p=(5,))
function("sub, scaled", lambda x, p: torch.sub(x, p, alpha=2), normal(B, 6, 5), p=(6, 1))
function("subtract", lambda x, p: torch.subtract(p, x, alpha=2), normal(B, 6, 5), p=(6, 1))
function("rsub", lambda x, p: torch.rsub(p, x, alpha=2), normal(B, 6, 5), p=(6, 1))
function("multiply", lambda x, p: torch.multiply(x, p), normal(B, 6, 5), p=(5,))
function("div, rounded", lambda x, p: x / p + torch.div(x, p, rounding_mode="floor"), normal(B, 6, 5), p=(5,))
function("in-place div", lambda x, p: (x * 2).div_(p), normal(B, 6, 5), p=(5,))
function("where", lambda x, p: torch.where(x > 0, x, p), normal(B, 6, 5), p=(5,))
function("where, parameter first", lambda x, p: torch.where(x > 0, p, x), normal(B, 6, 5), p=(6, 1))
function("where, two parameters", lambda x, p, q: torch.where(x > 0, p, q), normal(B, 6, 5), p=(5,), q=())
function("where, the same parameter twice", lambda x, p: torch.where(x > 0, p, p), normal(B, 6, 5), p=(5,))
function("where, method", lambda x, p: x.where(x > 0, p), normal(B, 6, 5), p=(5,))
function("where, a place for each example", lambda x, p: torch.where(x > 0, x, p), normal(B, 5), p=(B, 5))
function("where, number", lambda x, p: torch.where(x > 0, p, 0.0), normal(B, 6, 5), p=(5,))
function("masked_fill", lambda x, p: x.masked_fill(x > 0, p), normal(B, 6, 5), p=())
function("masked_fill of a parameter", lambda x, p: p.masked_fill(x > 0, 2.0), normal(B, 5), p=(B, 5))
function("mask token", lambda x, p: torch.where(x[..., :1] > 0, p, x), normal(B, 6, 5), p=(1, 1, 5))
function("lerp", lambda x, p: torch.lerp(x, x * x, p), normal(B, 5), p=(5,))
function("lerp towards a parameter", lambda x, p: x.lerp(p, 0.3), normal(B, 6, 5), p=(5,))
function("lerp from a parameter", lambda x, p: torch.lerp(p, x, weight=0.3), normal(B, 6, 5), p=(6, 5))
function("lerp between parameters", lambda x, p, q: torch.lerp(p, q, x), normal(B, 6, 5), p=(6, 5), q=(5,))
function("addcmul", lambda x, p, q: torch.addcmul(p, x, q, value=0.5), normal(B, 6, 5), p=(5,), q=(6, 1))
function("addcmul, in place", lambda x, p, q: (x * 1).addcmul_(p, q.expand(6, 5)), normal(B, 6, 5), p=(5,), q=(6, 1))
function("addcmul, one parameter twice", lambda x, p: torch.addcmul(x, p, p), normal(B, 6, 5), p=(5,))
function("addcdiv", lambda x, p: torch.addcdiv(x, x, p, value=2), normal(B, 6, 5), p=(5,))
function("maximum", lambda x, p: torch.maximum(x, p), normal(B, 6, 5), p=(5,))
function("minimum", lambda x, p: torch.minimum(p, x), normal(B, 6, 5), p=(6, 5))
function("maximum, ties", lambda x, p: torch.maximum(x.relu(), p.relu()), normal(B, 6, 5), p=(5,))
function("max of two", lambda x, p: torch.max(x, p) - x.min(p), normal(B, 6, 5), p=(5,))
function("clamp", lambda x, p, q: x.clamp(p, p + q * q), normal(B, 6, 5), p=(5,), q=(5,))
function("clamp by keyword", lambda x, p: torch.clamp(x, max=p), normal(B, 6, 5), p=(6, 1))
function("clamp_min", lambda x, p: x.clamp_min(p), normal(B, 6, 5), p=(5,))
function("pow", lambda x, p: torch.pow(x.abs() + 0.5, p), normal(B, 6, 5), p=(5,))
function("operator pow", lambda x, p: (x.abs() + 0.5) ** p, normal(B, 6, 5), p=())
function("pow of a parameter", lambda x, p: (p * p + 0.5) ** x, normal(B, 6, 5), p=(5,))
function("atan2", lambda x, p: torch.atan2(x, p), normal(B, 6, 5), p=(5,))
function("hypot", lambda x, p: torch.hypot(x, p), normal(B, 6, 5), p=(5,))
function("logaddexp", lambda x, p: torch.logaddexp(x, p), normal(B, 6, 5), p=(5,))
function("special.xlog1py", lambda x, p: torch.special.xlog1py(x, p * p), normal(B, 6, 5), p=(5,))
function("remainder", lambda x, p: x % p, normal(B, 6, 5), p=(5,))
function(
    "a number for each row, time first",
    lambda x, p: (x.transpose(0, 1) * p).transpose(0, 1),
    normal(B, B, 5),
    p=(B, 1, 1),
)
function("one example without axes", lambda x, p: (x[0, 0] * p - p).view(1, 1), normal(1, 1), p=())


class Frames(nn.Module):
    """(B, k, C, ...) flattened into B * k rows."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.flatten(0, 1)).unflatten(0, x.shape[:2])


def moved_statistics(layer: nn.Module) -> nn.Module:
    layer.running_mean.normal_()
    layer.running_var.uniform_(0.5, 2)
    return layer


def _imul(x: Tensor, p: Tensor) -> Tensor:
    x *= p
    x += p
    return x
