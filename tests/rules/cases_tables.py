"""Embedding tables, bags of embeddings, parameters indexed by data."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from case_registry import B, TimeFirst, case, function, ids, normal

case("embedding", lambda: nn.Embedding(6, 3), ids(6, B))
case("embedding 2-D", lambda: nn.Embedding(6, 3), ids(6, B, 5))
case("embedding 3-D", lambda: nn.Embedding(6, 3), ids(6, B, 2, 5))
case("embedding padding", lambda: nn.Embedding(6, 3, padding_idx=2), ids(6, B, 5))
case("embedding padding from the end", lambda: nn.Embedding(6, 3, padding_idx=-1), ids(6, B, 5))
case("embedding, time first", lambda: TimeFirst(nn.Embedding(6, 3)), ids(6, B, B))
function("tied table", lambda i, w: F.embedding(i, w) @ w.T, ids(6, B, 5), w=(6, 3))

function("embedding, one example without axes", lambda i, w: F.embedding(i[0], w).unsqueeze(0), ids(6, 1), w=(6, 3))
function("embedding, vocabulary equals B", lambda i, w: F.embedding(i, w), ids(B, B, B), w=(B, B))
function(
    "embedding, rows batch-minor",
    lambda i, w: F.embedding(i.T.flatten(), w).unflatten(0, (5, B)).transpose(0, 1),
    ids(6, B, 5),
    w=(6, 3),
)
function("embedding, int32 ids", lambda i, w: F.embedding(i.int(), w), ids(6, B, 5), w=(6, 3))
function("torch.embedding", lambda i, w: torch.embedding(w, i), ids(6, B, 5), w=(6, 3))

# bags
for mode in ("sum", "mean", "max"):
    case(f"embedding bag {mode}", lambda m=mode: nn.EmbeddingBag(6, 3, mode=m), ids(6, B, 5))
    case(f"embedding bag {mode}, padding", lambda m=mode: nn.EmbeddingBag(6, 3, mode=m, padding_idx=2), ids(6, B, 5))
    function(
        f"embedding bag {mode}, offsets",
        lambda i, w, m=mode: F.embedding_bag(i, w, torch.tensor([0, 3, 3, 8]), mode=m),
        ids(6, 10),
        w=(6, 3),
    )
    function(
        f"embedding bag {mode}, last offset and padding from the end",
        lambda i, w, m=mode: F.embedding_bag(
            i, w, torch.tensor([0, 3, 5, 8, 10]), mode=m, include_last_offset=True, padding_idx=-1
        ),
        ids(6, 10),
        w=(6, 3),
    )
case("embedding bag, two bags an example", lambda: TwoBags(), ids(6, B, 2, 5))
function(
    "embedding bag, weights",
    lambda i, s, w: F.embedding_bag(i, w, mode="sum", per_sample_weights=s),
    ids(6, B, 5),
    normal(B, 5),
    w=(6, 3),
)
function(
    "embedding bag, weights and offsets",
    lambda i, s, w: F.embedding_bag(i, w, torch.tensor([0, 3, 3, 8]), mode="sum", per_sample_weights=s),
    ids(6, 10),
    normal(10),
    w=(6, 3),
)
function(
    "embedding bag, computed weights",
    lambda i, w, s: F.embedding_bag(i, w, mode="sum", per_sample_weights=F.embedding(i, s).squeeze(-1)),
    ids(6, B, 5),
    w=(6, 3),
    s=(6, 1),
)


class TwoBags(nn.Module):
    """Two consecutive bags for each example."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.EmbeddingBag(6, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.inner(ids.flatten(0, 1)).unflatten(0, ids.shape[:2])


# indexing by data
function("p[ids]", lambda i, p: p[i], ids(6, B, 3), p=(6, 5))
function("p[ids], one each", lambda i, p: p[i], ids(6, B), p=(6, 5))
function("p[ids], negative", lambda i, p: p[i - 6], ids(6, B, 3), p=(6, 5))
function("p[ids], three axes", lambda i, p: p[i], ids(6, B, B), p=(6, 2, 5))
function("p[ids, :]", lambda i, p: p[i, :], ids(6, B, 3), p=(6, 5))
function("p[ids, ...]", lambda i, p: p[i, ...], ids(6, B, 3), p=(6, 2, 5))
function("p[:, ids]", lambda i, p: p[:, i].movedim(0, 1), ids(6, B, 3), p=(5, 6))
function("p[ids, 0]", lambda i, p: p[i, 0], ids(6, B, 3), p=(6, 5))
function("p[ids, ids]", lambda i, p: p[i, i % 5], ids(6, B, 3), p=(6, 5))
function("p[ids, None]", lambda i, p: p[i, None], ids(6, B, 3), p=(6, 5))
function("p[ids] of a vector", lambda i, p: p[i], ids(6, B, 3), p=(6,))
function("p[ids], time first, T equals B", lambda i, p: p[i.T].transpose(0, 1), ids(6, B, B), p=(6, B))
function(
    "p[ids], rows batch-minor",
    lambda i, p: p[i.T.flatten()].unflatten(0, (3, B)).transpose(0, 1),
    ids(6, B, 3),
    p=(6, 5),
)
function("p[ids] of a computed tensor", lambda i, p, q: (p * q)[i], ids(6, B, 3), p=(6, 5), q=(5,))
function("p[mask]", lambda x, p: p.expand(len(x), -1, -1)[x[:, 0] < 9], normal(B, 3), p=(1, 3, 5))
function("index_select", lambda i, p: torch.index_select(p, 0, i), ids(6, B), p=(6, 5))
function("index_select, axis 1", lambda i, p: p.index_select(1, i).T, ids(6, B), p=(5, 6))
function("index_select, axis 1, one example", lambda i, p: p.index_select(1, i[0]).unsqueeze(0), ids(6, 1, 5), p=(5, 6))
function(
    "p[ids], examples along the parameter's own axis",
    lambda x, i, p: p[i].T * x,
    normal(B, 3),
    ids(6, 3),
    p=(6, B),
)
function("index_select, axis from the end", lambda i, p: p.index_select(-1, i).T, ids(6, B), p=(5, 6))
function(
    "index_select, reshaped", lambda i, p: p.index_select(0, i.flatten()).unflatten(0, i.shape), ids(6, B, 3), p=(6, 5)
)
function("gather", lambda i, p: torch.gather(p, 0, i), ids(6, B, 5), p=(6, 5))
function("gather, axis 1", lambda i, p: p.gather(1, i), ids(5, B, 3), p=(B, 5))
function("gather from an expanded parameter", lambda i, p: p.expand(B, -1).gather(1, i), ids(5, B, 3), p=(1, 5))
function("take", lambda i, p: torch.take(p, i), ids(30, B, 3), p=(6, 5))
function("take_along_dim", lambda i, p: torch.take_along_dim(p, i, 0), ids(6, B, 5), p=(6, 5))
function("take_along_dim, flat", lambda i, p: torch.take_along_dim(p, i.flatten()).view(B, 3), ids(30, B, 3), p=(6, 5))
function(
    "relative position bias", lambda x, p: x + p[torch.arange(9).view(3, 3)].movedim(2, 0), normal(B, 2, 3, 3), p=(9, 2)
)
function("torch.embedding, no padding", lambda i, p: torch.embedding(p, i, -1), ids(6, B, 3), p=(6, 5))
function("torch.embedding, padding", lambda i, p: torch.embedding(p, i, 5), ids(6, B, 3), p=(6, 5))
function(
    "torch.embedding_bag",
    lambda i, p: torch.embedding_bag(p, i.flatten(), torch.arange(0, i.numel(), 3))[0],
    ids(6, B, 3),
    p=(6, 5),
)
