"""Attention in torch's own modules and functions: packed, separate, masked; transformers; class tokens."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from case_registry import B, case, function, normal


class Attend(nn.Module):
    """Multi-head attention over one or three inputs, batch-first outside."""

    def __init__(
        self, dropout: float = 0.0, batch_first: bool = True, call: dict[str, Any] | None = None, **options: Any
    ) -> None:
        super().__init__()
        self.batch_first, self.call = batch_first, call or {"need_weights": False}
        self.inner = nn.MultiheadAttention(4, 2, dropout=dropout, batch_first=batch_first, **options)

    def forward(self, x: Tensor, key: Tensor | None = None, value: Tensor | None = None) -> Tensor:
        key = x if key is None else key
        inputs = (x, key, key if value is None else value)
        inputs = inputs if self.batch_first else [t.transpose(0, 1) for t in inputs]
        if all(t is inputs[0] for t in (x, key)) and self.batch_first and value is None:
            inputs = (x, x, x)
        y, weights = self.inner(*inputs, **self.call)
        y = y if self.batch_first else y.transpose(0, 1)
        return y if weights is None else torch.cat([y.flatten(1), weights.flatten(1)], 1)


def padding(length: int) -> Tensor:
    mask = torch.zeros(B, length, dtype=torch.bool)
    mask[:, -1] = True
    mask[0, 1:] = True
    return mask


causal = torch.ones(5, 5, dtype=torch.bool).triu(1)
case("attention", lambda: Attend(), normal(B, 5, 4))
case("attention with dropout", lambda: Attend(dropout=0.4), normal(B, 5, 4))
case("attention, time first", lambda: Attend(batch_first=False), normal(B, 5, 4))
case("attention, time first, T equals B", lambda: Attend(batch_first=False), normal(B, B, 4))
case("attention, without bias", lambda: Attend(bias=False), normal(B, 5, 4))
case("attention, key and value apart", lambda: Attend(), normal(B, 5, 4), normal(B, 3, 4), normal(B, 3, 4))
case("attention, kdim and vdim", lambda: Attend(kdim=3, vdim=2), normal(B, 5, 4), normal(B, 6, 3), normal(B, 6, 2))
case("attention, bias_k and bias_v", lambda: Attend(add_bias_kv=True), normal(B, 5, 4))
case("attention, add_zero_attn", lambda: Attend(add_zero_attn=True), normal(B, 5, 4))
case(
    "attention, key padding",
    lambda: Attend(call={"key_padding_mask": padding(5), "need_weights": False}),
    normal(B, 5, 4),
)
case(
    "attention, causal",
    lambda: Attend(call={"attn_mask": causal, "is_causal": True, "need_weights": False}),
    normal(B, 5, 4),
)
case("encoder layer", lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout=0.3, batch_first=True), normal(B, 5, 4))
case(
    "encoder, norm first, causal",
    lambda: Causal(
        nn.TransformerEncoder(
            nn.TransformerEncoderLayer(4, 2, 8, norm_first=True, batch_first=True, activation="gelu"),
            2,
            enable_nested_tensor=False,
        )
    ),
    normal(B, 5, 4),
)
case("encoder in eval", lambda: nn.TransformerEncoderLayer(4, 2, 8, batch_first=True).eval(), normal(B, 5, 4))
case("decoder layer", lambda: nn.TransformerDecoderLayer(4, 2, 8, batch_first=True), normal(B, 5, 4), normal(B, 3, 4))
case("transformer", lambda: nn.Transformer(4, 2, 1, 1, 8, batch_first=True), normal(B, 5, 4), normal(B, 3, 4))
case(
    "transformer, time first, T equals B",
    lambda: Swapped(nn.Transformer(4, 2, 1, 1, 8)),
    normal(B, B, 4),
    normal(B, B, 4),
)


class Causal(nn.Module):
    """An encoder under a causal mask."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, mask=causal, is_causal=True)


class Swapped(nn.Module):
    """Time-first module of two inputs."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.inner(x.transpose(0, 1), y.transpose(0, 1)).transpose(0, 1)


# learned queries, keys and values
sdpa = F.scaled_dot_product_attention
function("learned key and value", lambda x, k, v: sdpa(x, k, v), normal(B, 5, 4), k=(1, 3, 4), v=(1, 3, 4))
function(
    "learned key and value, heads",
    lambda x, k, v: sdpa(x, k.expand(B, -1, -1, -1), v.expand(B, -1, -1, -1)),
    normal(B, 2, 5, 4),
    k=(2, 3, 4),
    v=(2, 3, 4),
)
function("learned query", lambda x, q: sdpa(q.expand(len(x), -1, -1), x, x), normal(B, 5, 4), q=(3, 4))
function("learned attention bias", lambda x, p: sdpa(x, x, x, attn_mask=p), normal(B, 2, 5, 4), p=(2, 5, 5))
function(
    "prefix of keys",
    lambda x, k: sdpa(x, torch.cat([k.expand(B, -1, -1), x], 1), torch.cat([x, k.expand(B, -1, -1)], 1)),
    normal(B, 5, 4),
    k=(2, 4),
)

# class tokens
function("class token by cat", lambda x, c: torch.cat([c.expand(len(x), -1, -1), x], 1), normal(B, 3, 5), c=(1, 1, 5))
function(
    "class token by cat, T equals B",
    lambda x, c: torch.cat([x, c.expand(B, 1, 5)], dim=1),
    normal(B, B, 5),
    c=(1, 1, 5),
)
function(
    "class token by cat, repeated", lambda x, c: torch.cat((c.repeat(B, 1, 1), x), -2), normal(B, 3, 5), c=(1, 1, 5)
)
function(
    "class token by cat, time first",
    lambda x, c: torch.cat([c.expand(-1, B, -1), x.transpose(0, 1)]).transpose(0, 1),
    normal(B, B, 5),
    c=(1, 1, 5),
)
function("class token by stack", lambda x, c: torch.stack([c.expand(B, 5), x], 1), normal(B, 5), c=(5,))
function("class token by vstack", lambda x, c: torch.vstack([c.expand(3, B), x.T]).T, normal(B, 5), c=(3, 1))
function("class token by stack, last axis", lambda x, c: torch.stack((x, c.expand(B, 5)), -1), normal(B, 5), c=(5,))
function("row added to the examples", lambda x, c: torch.cat([x.T, c], dim=0).T, normal(B, 5), c=(2, B))
function("one parameter joined twice", lambda x, c: torch.cat([c, x, c * 2, c], -1), normal(B, 5), c=(B, 3))
function(
    "joined to a complex tensor",
    lambda x, c: torch.view_as_real(torch.cat([x * 1j, c.expand(B, 2)], 1)),
    normal(B, 5),
    c=(2,),
)
function("many joined", lambda x, c: torch.cat([x] * 70 + [c.expand(B, 5)], 1), normal(B, 5), c=(1, 5))
function("class token by hstack", lambda x, c: torch.hstack([c.expand(B, -1), x]), normal(B, 5), c=(1, 3))

# the weights too: two outputs
case(
    "attention, both masks", lambda: Attend(call={"attn_mask": causal, "key_padding_mask": padding(5)}), normal(B, 5, 4)
)
case("attention, need_weights", lambda: Attend(call={"need_weights": True}), normal(B, 5, 4))
case("attention, weights of each head", lambda: Attend(call={"average_attn_weights": False}), normal(B, 5, 4))
