"""Rows in no regular order: an operation that sees some rows of each example, as an expert sees its tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from case_registry import B, function, normal

CHOSEN = torch.tensor(
    [[1, 0, 1, 1, 0, 1], [0, 0, 0, 0, 0, 1], [0, 0, 0, 0, 0, 0], [1, 1, 0, 0, 1, 1]], dtype=torch.bool
)
"""Which of six rows of each of four examples the operation sees."""


def routed(name: str, body: Callable[..., Tensor], *size: int, **shapes: tuple[int, ...]) -> None:
    """Register a case in which `body` sees the chosen rows alone."""

    def forward(x: Tensor, scale: Tensor, **parameters: Any) -> Tensor:
        x = x * scale
        y = body(x[CHOSEN], **parameters)
        return x.new_zeros(B, 6, *y.shape[1:]).index_put(CHOSEN.nonzero(as_tuple=True), y.tanh())

    function(f"ragged {name}", forward, normal(B, 6, *size), scale=(), **shapes)


def lookup(x: Tensor) -> Tensor:
    return (x.detach().abs().sum(-1) * 3).long() % 6


routed("linear", lambda x, w, b: F.linear(x, w, b), 5, w=(3, 5), b=(3,))
routed("matmul", lambda x, w: x @ w, 5, w=(5, 3))
routed("matmul on the left", lambda x, w: (w @ x.T).T, 5, w=(3, 5))
routed("heads", lambda x, w: torch.einsum("nhd,hdp->nhp", x, w), 2, 5, w=(2, 5, 3))
routed("bilinear", lambda x, w: F.bilinear(x, x.tanh(), w), 3, w=(2, 3, 3))
routed("convolution", lambda x, w, b: F.conv1d(x, w, b), 3, 7, w=(4, 3, 2), b=(4,))
routed("grouped convolution", lambda x, w: F.conv2d(x, w, padding=1, groups=2), 4, 3, 3, w=(4, 2, 2, 2))
routed("transposed convolution", lambda x, w, b: F.conv_transpose1d(x, w, b, 2), 3, 4, w=(3, 2, 3), b=(2,))
routed("layer norm", lambda x, w, b: F.layer_norm(x, (5,), w, b), 5, w=(5,), b=(5,))
routed("group norm", lambda x, w, b: F.group_norm(x, 2, w, b), 4, 3, w=(4,), b=(4,))
routed("prelu", lambda x, w: F.prelu(x, w), 4, 3, w=(4,))
routed("product", lambda x, p: x * p, 5, p=(5,))
routed("maximum", lambda x, p: torch.maximum(x, p), 5, p=())
routed(
    "bag, weighted",
    lambda x, w: F.embedding_bag(lookup(x.unsqueeze(-1)), w, mode="sum", per_sample_weights=x),
    5,
    w=(6, 3),
)
routed("fallback", lambda x, p: torch.cdist(x, p), 5, p=(3, 5))
routed("class token", lambda x, c: torch.cat([c.expand(len(x), 1, 5), x], 1), 2, 5, c=(1, 1, 5))
