"""Linear layers, matrix products, einsum, bilinear maps."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from case_registry import B, Rows, TimeFirst, case, function, normal

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

function("f.linear, parameter as input", lambda x, p: F.linear(p, x).T, normal(B, 5), p=(3, 5))
function("f.linear, vector weight", lambda x, w: F.linear(x, w), normal(B, 6, 5), w=(5,))

# matrix products
function("x.matmul(w)", lambda x, w: x.matmul(w), normal(B, 6, 5), w=(5, 3))
function("w.matmul(x)", lambda x, w: w.matmul(x), normal(B, 5, 6), w=(3, 5))
function("w @ x, examples last", lambda x, w: (w @ x.T).T, normal(B, 5), w=(3, 5))
function("w @ x, examples last, p equals B", lambda x, w: (w @ x.T).T, normal(B, 5), w=(B, 5))
function("w @ x, vector", lambda x, w: (w @ x.unsqueeze(-1)).squeeze(-1), normal(B, 5), w=(3, 5))
function("x @ w, vector", lambda x, w: x @ w, normal(B, 6, 5), w=(5,))
function("w @ x, row vector", lambda x, w: w @ x, normal(B, 5, 6), w=(5,))
function("linalg.matmul", lambda x, w: torch.linalg.matmul(x, w), normal(B, 6, 5), w=(5, 3))
function("__rmatmul__", lambda x, w: torch.Tensor.__rmatmul__(w, x), normal(B, 6, 5), w=(5, 3))
function(
    "x @ w, time first, T equals B", lambda x, w: (x.transpose(0, 1) @ w).transpose(0, 1), normal(B, B, 5), w=(5, 3)
)
function("x @ w, T and d and p equal B", lambda x, w: x @ w, normal(B, B, B), w=(B, B))
function("w @ x, T and d and p equal B", lambda x, w: w @ x, normal(B, B, B), w=(B, B))
function("x @ w twice", lambda x, w: (x @ w).tanh() @ w, normal(B, 3, 5), w=(5, 5))
function("mv", lambda x, w: torch.mv(x, w).unsqueeze(1), normal(B, 5), w=(5,))
function("mv of the parameter", lambda x, w: torch.mv(w, x[0]).unsqueeze(0), normal(1, 5), w=(3, 5))
function("dot", lambda x, w: torch.dot(x[0], w).view(1, 1), normal(1, 5), w=(5,))
function("inner", lambda x, w: torch.inner(x, w), normal(B, 6, 5), w=(2, 3, 5))
function("outer", lambda x, w: torch.outer(x, w), normal(B), w=(5,))
function("outer, p equals B", lambda x, w: torch.outer(x, w), normal(B), w=(B,))
function("outer of the parameter", lambda x, w: torch.outer(w, x).T, normal(B), w=(5,))
function("tensordot", lambda x, w: torch.tensordot(x, w, 2), normal(B, 3, 5), w=(3, 5, 2))
function(
    "tensordot, axes of a tensor",
    lambda x, w: torch.tensordot(x, w, torch.tensor([[2, 1], [0, 2]])),
    normal(B, 3, 5),
    w=(5, 2, 3),
)
function("tensordot, named axes", lambda x, w: torch.tensordot(x, w, ([2, 1], [0, 2])), normal(B, 3, 5), w=(5, 2, 3))
function(
    "tensordot of the parameter",
    lambda x, w: torch.tensordot(w, x, ([1], [2])).movedim(1, 0),
    normal(B, 3, 5),
    w=(2, 5),
)
function("batched matmul, one weight", lambda x, w: x @ w, normal(B, 2, 6, 5), w=(1, 5, 3))
function("batched matmul, heads broadcast", lambda x, w: (x @ w).movedim(1, 0), normal(B, 5), w=(2, 5, 3))
function("batched matmul, heads equal B", lambda x, w: (x @ w).movedim(1, 0), normal(B, 5), w=(B, 5, 3))
function("batched matmul, a weight for each example", lambda x, w: x @ w, normal(B, 3, 5), w=(B, 5, 3))
function("batched matmul, parameter on the left", lambda x, w: w @ x, normal(B, 2, 5, 6), w=(2, 3, 5))
function("batched matmul, one row", lambda x, w: torch.matmul(x, w), normal(B, 2, 1, 5), w=(2, 5, 3))
function("x.bmm", lambda x, w: x.transpose(0, 1).bmm(w).transpose(0, 1), normal(B, 2, 5), w=(2, 5, 3))
function("bmm, parameter first", lambda x, w: torch.bmm(w, x.movedim(0, 2)).movedim(2, 0), normal(B, 2, 5), w=(2, 3, 5))
function("bmm, expanded weight", lambda x, w: torch.bmm(x, w.expand(B, 5, 3)), normal(B, 6, 5), w=(1, 5, 3))
function(
    "bmm, examples and heads in one axis",
    lambda x, w: torch.bmm(x.flatten(0, 1), w.repeat(B, 1, 1)).unflatten(0, (B, 2)),
    normal(B, 2, 6, 5),
    w=(2, 5, 3),
)
function("addmm, scaled", lambda x, b, w: torch.addmm(b, x, w, beta=0.5, alpha=2), normal(B, 5), b=(3,), w=(5, 3))
function(
    "addmm, bias is data", lambda x, y, w: torch.addmm(y, x, w, beta=0.5, alpha=2), normal(B, 5), normal(B, 3), w=(5, 3)
)
function("addmm, parameter on the left", lambda x, w: torch.addmm(x.T, w, x.T).T, normal(B, 5), w=(5, 5))
function("addmm, method, in place", lambda x, w: (x * 1).addmm_(x, w, alpha=3), normal(B, 5), w=(5, 5))
function("addmm, one parameter twice", lambda x, w: torch.addmm(w, x, w), normal(B, B), w=(B, B))
function("addmv", lambda x, y, w: torch.addmv(y, x, w, alpha=2).unsqueeze(1), normal(B, 5), normal(B), w=(5,))
function(
    "baddbmm",
    lambda x, b, w: torch.baddbmm(b, x.transpose(0, 1), w, alpha=0.5, beta=2).transpose(0, 1),
    normal(B, 2, 5),
    b=(2, 1, 3),
    w=(2, 5, 3),
)
function(
    "addbmm",
    lambda x, b, w: torch.addbmm(b, x.transpose(0, 1), w, alpha=0.5, beta=2),
    normal(B, 2, 5),
    b=(B, 3),
    w=(2, 5, 3),
)
function("addr", lambda x, y, w: torch.addr(y, x, w, alpha=2), normal(B), normal(B, 3), w=(3,))
function("chain_matmul", lambda x, v, w: torch.linalg.multi_dot([x, v, w]), normal(B, 5), v=(5, 3), w=(3, 2))
function("kron", lambda x, w: torch.kron(x, w), normal(B, 5), w=(1, 3))

# einsum
for equation, x_shape, w_shape in (
    ("bd,dp->bp", (B, 5), (5, 3)),
    ("...d,dp->...p", (B, 6, 5), (5, 3)),
    ("bthd,hdp->bhtp", (B, B, 2, 5), (2, 5, 3)),
    ("bthd,hpd->bthp", (B, 3, B, 5), (B, 3, 5)),
    ("bthd,hdp->btp", (B, 3, 2, 5), (2, 5, 4)),
    ("btd,dhp->bthp", (B, 3, 5), (5, 2, 3)),
    ("btd,d->btd", (B, 3, 5), (5,)),
    ("btd,d->bt", (B, 3, 5), (5,)),
    ("btd,p->bp", (B, 3, 5), (2,)),
    ("btd,td->bt", (B, 3, 5), (3, 5)),
    ("btd,st->bsd", (B, B, 5), (B, B)),
    ("btd,de", (B, 3, 5), (5, 4)),
    ("b...d,e...d->be...", (B, 2, 5), (3, 2, 5)),
    ("b...d,e...d->be...", (B, 2, 5), (3, 1, 5)),
    ("bt,d->btd", (B, 3), (5,)),
    ("btd,dd->bt", (B, 3, 5), (5, 5)),
    ("btd,ep->bt", (B, 3, 5), (2, 3)),
    ("bd,bd->bd", (B, 5), (B, 5)),
    ("bd , d p -> b p", (B, 5), (5, 3)),
):
    function(
        f"einsum {equation} {w_shape}",
        lambda x, w, e=equation: torch.einsum(e, x, w).flatten(1) if x.dim() > 1 else None,
        normal(*x_shape),
        w=w_shape,
    )
function("einsum, parameter first", lambda x, w: torch.einsum("dp,bd->bp", w, x), normal(B, 5), w=(5, 3))
function(
    "einsum, time first",
    lambda x, w: torch.einsum("tbd,hdp->tbhp", x, w).movedim(1, 0),
    lambda: torch.randn(B, B, 5),
    w=(2, 5, 3),
)
function(
    "einsum, three factors",
    lambda x, y, w: torch.einsum("bi,oij,bj->bo", x, w, y),
    normal(B, 3),
    normal(B, 4),
    w=(5, 3, 4),
)
function(
    "einsum, two parameters", lambda x, v, w: torch.einsum("bd,dr,rp->bp", x, v, w), normal(B, 5), v=(5, 2), w=(2, 3)
)
function("einsum, one parameter twice", lambda x, w: torch.einsum("bd,de,ef->bf", x, w, w), normal(B, 5), w=(5, 5))
function(
    "einsum, one parameter twice, a place for each example",
    lambda x, w: torch.einsum("bd,bd,bd->bd", x, w, w),
    normal(B, 5),
    w=(B, 5),
)
function("einsum, list of operands", lambda x, w: torch.einsum("bd,dp->bp", [x, w]), normal(B, 5), w=(5, 3))
function("einsum, sublists", lambda x, w: torch.einsum(x, [0, 1], w, [1, 2], [0, 2]), normal(B, 5), w=(5, 3))
function("einsum, one number", lambda x, w: torch.einsum("bd,->bd", x, w), normal(B, 5), w=())
function("einsum, low rank", lambda x, a, b: torch.einsum("bd,rd,pr->bp", x, a, b), normal(B, 5), a=(2, 5), b=(3, 2))

# bilinear maps
case("bilinear", lambda: nn.Bilinear(4, 3, 5), normal(B, 4), normal(B, 3))
case("bilinear, rows", lambda: nn.Bilinear(4, 3, 5), normal(B, 6, 4), normal(B, 6, 3))
case("bilinear, T equals B", lambda: nn.Bilinear(4, 3, 5, bias=False), normal(B, B, 4), normal(B, B, 3))
function(
    "bilinear, time first",
    lambda x, y, w: F.bilinear(x.mT.movedim(2, 0), y.movedim(1, 0), w).movedim(1, 0),
    lambda: torch.randn(B, 4, B),
    normal(B, B, 3),
    w=(5, 4, 3),
)
function(
    "bilinear, one factor is data, one a parameter",
    lambda x, p: F.bilinear(x, p.expand(len(x), 3), torch.ones(2, 4, 3)),
    normal(B, 4),
    p=(1, 3),
)
