"""Tensors computed from parameters alone, and what is computed of them."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from case_registry import B, function, normal

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
