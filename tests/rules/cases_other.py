"""Operations that few models use, or that have no rule of their own: exact all the same."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from case_registry import B, case, function, ids, normal

complex_ = torch.view_as_complex


def real(x: Tensor) -> Tensor:
    return torch.view_as_real(x).flatten(1)


# scattering a parameter
function(
    "scatter of a parameter",
    lambda i, p: torch.zeros(B, 6).scatter(1, i, p.expand(B, -1)),
    lambda: torch.rand(B, 6).argsort(1)[:, :3],
    p=(3,),
)
function(
    "scatter_add of a parameter",
    lambda i, p: torch.zeros(B, 6).scatter_add(1, i, p.expand(B, -1)),
    ids(6, B, 3),
    p=(3,),
)
function(
    "scatter_add into a parameter",
    lambda i, x, p: p.expand(B, -1).scatter_add(1, i, x),
    ids(6, B, 3),
    normal(B, 3),
    p=(6,),
)
function(
    "index_add of a parameter",
    lambda x, p: x.index_add(1, torch.tensor([0, 2, 0]), p.expand(B, 3, 5)),
    normal(B, 4, 5),
    p=(3, 5),
)
function(
    "index_add of examples to a parameter",
    lambda x, p: p.expand(B, 4, 5).index_add(1, torch.tensor([1, 2, 0]), x),
    normal(B, 3, 5),
    p=(4, 5),
)
function("masked_scatter of a parameter", lambda x, p: x.masked_scatter(x > -9, p.expand(B, -1)), normal(B, 5), p=(5,))
function(
    "index_put of a parameter",
    lambda x, p: x.index_put((torch.arange(B), torch.zeros(B, dtype=torch.long)), p.expand(B)),
    normal(B, 5),
    p=(1,),
)

# complex
function("fft times a real filter", lambda x, p: torch.fft.irfft(torch.fft.rfft(x) * p, n=6), normal(B, 6), p=(4,))
function(
    "fft times a complex filter",
    lambda x, p: torch.fft.irfft(torch.fft.rfft(x) * complex_(p), n=6),
    normal(B, 6),
    p=(4, 2),
)
function(
    "fft2 times a complex filter",
    lambda x, p: torch.fft.irfft2(torch.fft.rfft2(x) * complex_(p), s=(4, 6)),
    normal(B, 2, 4, 6),
    p=(2, 4, 4, 2),
)
function(
    "fft, einsum over channels",
    lambda x, p: torch.fft.irfft(torch.einsum("bik,iok->bok", torch.fft.rfft(x), complex_(p)), n=6),
    normal(B, 3, 6),
    p=(3, 2, 4, 2),
)
function("complex product", lambda x, p: real(complex_(x) * complex_(p)), normal(B, 5, 2), p=(5, 2))
function("complex product with a real scale", lambda x, p: real(complex_(x) * p), normal(B, 5, 2), p=())
function("complex sum", lambda x, p: real(complex_(x) + complex_(p)), normal(B, 5, 2), p=(5, 2))
function("complex sum with a real shift", lambda x, p: real(complex_(x) + p), normal(B, 5, 2), p=(5,))
function("complex matmul", lambda x, w: real(complex_(x) @ complex_(w)), normal(B, 6, 5, 2), w=(5, 3, 2))
function("complex linear", lambda x, w: real(F.linear(complex_(x), complex_(w))), normal(B, 6, 5, 2), w=(3, 5, 2))
function(
    "complex linear, conjugated",
    lambda x, w: real(F.linear(complex_(x), complex_(w).conj())),
    normal(B, 5, 2),
    w=(3, 5, 2),
)
function(
    "complex sum, complex alpha",
    lambda x, p: real(torch.add(complex_(x), complex_(p), alpha=2 + 1j)),
    normal(B, 5, 2),
    p=(5, 2),
)
function(
    "complex addmm, complex beta and alpha",
    lambda x, p, w: real(torch.addmm(complex_(p), complex_(x), complex_(w), beta=2 + 1j, alpha=1 - 1j)),
    normal(B, 5, 2),
    p=(3, 2),
    w=(5, 3, 2),
)
function("complex rms norm", lambda x, w: real(F.rms_norm(complex_(x), (5,), complex_(w))), normal(B, 5, 2), w=(5, 2))
function("complex division", lambda x, w: real(complex_(x) / complex_(w)), normal(B, 5, 2), w=(5, 2))
function(
    "complex convolution", lambda x, w: real(F.conv1d(complex_(x), complex_(w))), normal(B, 3, 6, 2), w=(4, 3, 2, 2)
)
function("polar phase", lambda x, p: real(complex_(x) * torch.polar(torch.ones_like(p), p)), normal(B, 6, 2), p=(6,))
function(
    "rotary, learned frequencies",
    lambda x, p: real(
        complex_(x.unflatten(-1, (-1, 2))) * torch.polar(torch.ones(6, 2), torch.outer(torch.arange(6.0), p))
    ),
    normal(B, 6, 4),
    p=(2,),
)
function("abs of a complex product", lambda x, p: (complex_(x) * complex_(p)).abs(), normal(B, 5, 2), p=(5, 2))

# distances, sums along an axis
function("cdist with learned centres", lambda x, p: torch.cdist(x, p), normal(B, 6, 5), p=(3, 5))
function("cdist, two axes", lambda x, p: torch.cdist(x, p), normal(B, 5), p=(3, 5))
function("pairwise distance", lambda x, p: F.pairwise_distance(x, p.expand(B, -1)).unsqueeze(1), normal(B, 5), p=(1, 5))
function(
    "cosine similarity",
    lambda x, p: F.cosine_similarity(x.unsqueeze(1), p.unsqueeze(0), dim=-1),
    normal(B, 5),
    p=(3, 5),
)
function("cumsum of a parameter", lambda x, p: p.cumsum(0) * x, normal(B, 6, 5), p=(6, 1))
function("cumsum of a product", lambda x, p: (x * p).cumsum(1), normal(B, 6, 5), p=(6, 1))
function("vecdot", lambda x, p: torch.linalg.vecdot(x, p), normal(B, 6, 5), p=(5,))
function(
    "solve with a parameter", lambda x, p: torch.linalg.solve(p @ p.T + torch.eye(5), x), normal(B, 5, 2), p=(5, 5)
)
function("householder", lambda x, p: x - 2 * (x @ p).unsqueeze(-1) * p / p.square().sum(), normal(B, 6, 5), p=(5,))

# images and grids
function(
    "grid sample of a learned map",
    lambda g, p: F.grid_sample(p.expand(B, -1, -1, -1), g, align_corners=False),
    lambda: torch.rand(B, 3, 3, 2) * 2 - 1,
    p=(1, 2, 4, 4),
)
function(
    "grid sample on a learned grid",
    lambda x, p: F.grid_sample(x, p.tanh().expand(B, -1, -1, -1), align_corners=False),
    normal(B, 2, 4, 4),
    p=(1, 3, 3, 2),
)
function(
    "affine grid of a parameter",
    lambda x, p: F.grid_sample(
        x, F.affine_grid(p.expand(B, 2, 3), [B, 2, 3, 3], align_corners=False), align_corners=False
    ),
    normal(B, 2, 4, 4),
    p=(2, 3),
)
function(
    "interpolated position table",
    lambda x, p: x + F.interpolate(p, size=(4, 5), mode="bicubic"),
    normal(B, 2, 4, 5),
    p=(1, 2, 3, 3),
)
function("padded parameter", lambda x, p: x * F.pad(p, (1, 1)), normal(B, 6, 5), p=(6, 3))
function("padded with a parameter", lambda x, p: F.pad(x, (1, 0)) + F.pad(p, (0, 5)), normal(B, 5), p=(1,))
function("unfold times a parameter", lambda x, p: F.unfold(x, 3).mT @ p, normal(B, 2, 5, 5), p=(18, 4))
function("fold of a product", lambda x, p: F.fold(p @ x, (4, 4), 2, stride=2), normal(B, 3, 4), p=(8, 3))
function("conv with data as the kernel", lambda x, p: F.conv1d(p, x), normal(B, 3, 2), p=(1, 3, 6))
function(
    "conv with a kernel from each example",
    lambda x, w: F.conv1d(torch.ones(1, B * 2, 6), (x @ w).view(B * 2, 1, 3), groups=B * 2).view(B, -1),
    normal(B, 5),
    w=(5, 6),
)
function("softmax of parameters over examples' scores", lambda x, p: (x @ p).softmax(-1) @ p.T, normal(B, 5), p=(5, 3))

# functions of a parameter
function("softplus scale", lambda x, p: x * F.softplus(p), normal(B, 5), p=(5,))
function(
    "special functions",
    lambda x, p: torch.special.erf(p) * x + torch.special.expit(x * p) + torch.special.i0(x * p),
    normal(B, 6, 5),
    p=(5,),
)
function("special.zeta", lambda x, p: torch.special.zeta(x.abs() + 2, p * p + 1), normal(B, 5), p=(5,))
function("gumbel softmax of logits", lambda x, p: F.gumbel_softmax(p.expand(B, -1)) * x, normal(B, 5), p=(5,))
function("gumbel softmax of logits and examples", lambda x, p: F.gumbel_softmax(p + x, tau=0.7), normal(B, 5), p=(5,))
function("dropout of a parameter", lambda x, p: F.dropout(p.expand(B, -1), 0.5) * x, normal(B, 5), p=(5,))
function("noise scaled by a parameter", lambda x, p: x + torch.randn_like(x) * p.exp(), normal(B, 5), p=(5,))
function(
    "normal distribution's log_prob",
    lambda x, p, q: torch.distributions.Normal(p, q.exp()).log_prob(x),
    normal(B, 5),
    p=(5,),
    q=(5,),
)
function("sorted product", lambda x, p: (x * p).sort(-1).values, normal(B, 5), p=(5,))
function("top entries of a product", lambda x, p: (x * p).topk(2, -1).values, normal(B, 5), p=(5,))
function("split parameters", lambda x, p: torch.add(*(x * part for part in p.chunk(2))), normal(B, 5), p=(2, 5))
function("unbound parameters", lambda x, p: sum(x @ w for w in p.unbind()), normal(B, 5), p=(3, 5, 2))
function(
    "meshgrid of parameters",
    lambda x, p, q: x + torch.meshgrid(p, q, indexing="ij")[0],
    normal(B, 3, 4),
    p=(3,),
    q=(4,),
)
function("roll and flip", lambda x, p: x + p.roll(1).flip(0), normal(B, 5), p=(5,))
function("spectral scale", lambda x, w: F.linear(x, w / torch.linalg.matrix_norm(w, 2)), normal(B, 5), w=(3, 5))
function("hyper-network", lambda x, z, w: F.linear(x, (z @ w).view(3, 5)), normal(B, 5), z=(2,), w=(2, 15))
function(
    "mixture of experts by weights",
    lambda x, g, w: torch.einsum("be,bd,edp->bp", (x @ g).softmax(-1), x, w),
    normal(B, 5),
    g=(5, 3),
    w=(3, 5, 2),
)
case("parametrised weight norm", lambda: nn.utils.parametrizations.weight_norm(nn.Linear(5, 3)), normal(B, 5))
case("parametrised orthogonal", lambda: nn.utils.parametrizations.orthogonal(nn.Linear(5, 3)), normal(B, 5))
case("adaptive log softmax", lambda: LogProbabilities(nn.AdaptiveLogSoftmaxWithLoss(5, 8, [3])), normal(B, 5))


class LogProbabilities(nn.Module):
    """Log-probabilities of every class."""

    def __init__(self, inner: nn.AdaptiveLogSoftmaxWithLoss) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner.log_prob(x)


function("ldexp, a parameter of no dimension", lambda x, p: torch.ldexp(x, p), normal(B, 5), p=())
function("logcumsumexp", lambda x, w: torch.logcumsumexp(x @ w, 1), normal(B, 6, 5), w=(5, 3))
function("logcumsumexp, method", lambda x, w: (x @ w).logcumsumexp(dim=-1), normal(B, 6, 5), w=(5, 3))
function("sparse rows", lambda x, w: (x.relu().to_sparse() @ w).exp(), normal(B, 5), w=(5, 3))
function("sparse linear", lambda x, w: F.linear(x.relu().to_sparse_csr(), w).exp(), normal(B, 5), w=(3, 5))
function("normalised prototypes", lambda x, w: x @ (F.normalize(torch.ones(3, 5), dim=1) @ w).T, normal(B, 4), w=(5, 4))


class Sign(torch.autograd.Function):
    """Signs, straight through where a weight is small; its backward has no batching rule."""

    @staticmethod
    def forward(ctx, w):
        ctx.save_for_backward(w)
        return w.sign()

    @staticmethod
    def backward(ctx, gradient):
        (w,) = ctx.saved_tensors
        kept, found = w.abs() < 1, torch.zeros_like(w)
        found[kept] = gradient[kept]
        return found


function("binary weights", lambda x, w: F.linear(x, Sign.apply(w)), normal(B, 5), w=(3, 5))


# a view of a parameter that is shaped by the examples
function("expand_as", lambda x, p: x * p.expand_as(x), normal(B, 6, 5), p=(5,))
function("broadcast_tensors", lambda x, p: torch.mul(*torch.broadcast_tensors(x, p)), normal(B, 6, 5), p=(5,))
function("p[i], one example", lambda i, p: p[i[0]].unsqueeze(0), ids(6, 1), p=(6, 5))
function("mse with a parameter", lambda x, p: F.mse_loss(x, p.expand_as(x), reduction="none"), normal(B, 5), p=(5,))
function("cross product", lambda x, p: torch.linalg.cross(x, p.expand_as(x)), normal(B, 3), p=(3,))
function(
    "normal distribution's rsample",
    lambda x, p, q: torch.distributions.Normal(p + x, q.exp()).rsample(),
    normal(B, 5),
    p=(5,),
    q=(5,),
)
