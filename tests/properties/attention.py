"""Attention: raw, with learned keys and values, `nn.MultiheadAttention` in its forms, transformer layers."""

from __future__ import annotations

from properties.program import Program, Value, operation


def _heads(o: Program, width: int) -> int:
    return o.pick([n for n in (1, 2) if width % n == 0])


@operation(ranks=(2,))
def learned_keys_and_values(o: Program, v: Value) -> Value:
    rows = o.pick((o.length, 2, o.batch))
    keys, values = o.parameter(rows, v.last), o.parameter(rows, v.last)
    dropout = o.maybe(", dropout_p=0.3 if self.training else 0.0", 3)
    expand = o.mode("", ".expand(B, -1, -1)", "[None]")
    return o.value(f"F.scaled_dot_product_attention({v}, {keys}{expand}, {values}{expand}{dropout})", v.shape)


@operation(ranks=(2,))
def learned_queries(o: Program, v: Value) -> Value:
    rows = o.pick((1, 2, o.batch))
    query = f"{o.parameter(rows, v.last)}.expand(B, -1, -1)"
    return o.value(f"F.scaled_dot_product_attention({query}, {v}, {v})", (rows, v.last))


@operation(ranks=(2,))
def attention_bias(o: Program, v: Value) -> Value:
    bias = o.parameter(v.shape[0], v.shape[0])
    return o.value(
        o.mode(
            f"F.scaled_dot_product_attention({v}, {v}, {v}, attn_mask={bias})",
            f"torch.softmax({v} @ {v}.mT + {bias}, -1) @ {v}",
        ),
        v.shape,
    )


@operation(ranks=(2,))
def self_attention(o: Program, v: Value) -> Value:
    layout = o.mode("first", "second")
    x = o.relayout(v, layout)
    options = [f"{v.last}, {_heads(o, v.last)}, batch_first={layout == 'first'}"]
    options += o.pick(([], ["dropout=0.3"], ["bias=False"], ["add_bias_kv=True"], ["add_zero_attn=True"]))
    if "add_bias_kv=True" in options:
        options.append("add_zero_attn=True") if o.chance(2) else None
    layer = o.module(f"nn.MultiheadAttention({', '.join(options)})")
    extra = o.mode("need_weights=False", "", "need_weights=True, average_attn_weights=False")
    if o.chance(3):
        mask = f"torch.ones({v.shape[0]}, {v.shape[0]}, dtype=torch.bool).triu(1)"
        extra += f"{', ' if extra else ''}attn_mask={mask}"
    return o.value(f"{layer}({', '.join(filter(None, (f'{x}, {x}, {x}', extra)))})[0]", v.shape, layout)


@operation(ranks=(2,))
def padded_self_attention(o: Program, v: Value) -> Value:
    ids = o.ids((v.shape[0],))
    layer = o.module(f"nn.MultiheadAttention({v.last}, {_heads(o, v.last)}, batch_first=True)")
    o.forward.append(f"padding = ({ids} == 0) & (torch.arange({v.shape[0]}) > 0)")
    return o.value(f"{layer}({v}, {v}, {v}, key_padding_mask=padding, need_weights=False)[0]", v.shape)


@operation(ranks=(2,))
def attention_weights(o: Program, v: Value) -> Value:
    layer = o.module(f"nn.MultiheadAttention({v.last}, {_heads(o, v.last)}, batch_first=True)")
    return o.value(f"{layer}({v}, {v}, {v})[1]", (v.shape[0], v.shape[0]))


@operation(ranks=(2,))
def cross_attention(o: Program, v: Value) -> Value:
    memory = o.add_input(o.length, 2)
    layer = o.module(f"nn.MultiheadAttention({v.last}, {_heads(o, v.last)}, kdim=2, vdim=2, batch_first=True)")
    return o.value(f"{layer}({v}, {memory}, {memory}, need_weights=False)[0]", v.shape)


@operation(ranks=(2,))
def encoder_layer(o: Program, v: Value) -> Value:
    layout = o.mode("first", "second")
    x = o.relayout(v, layout)
    options = f"dropout={o.pick((0.0, 0.3))}, batch_first={layout == 'first'}, norm_first={o.chance(2)}"
    layer = o.module(f"nn.TransformerEncoderLayer({v.last}, {_heads(o, v.last)}, 3, {options})")
    return o.value(f"{layer}({x})", v.shape, layout)


@operation(ranks=(2,))
def decoder_layer(o: Program, v: Value) -> Value:
    memory = o.other(v)
    options = "dropout=0.0, batch_first=True"
    layer = o.module(f"nn.TransformerDecoderLayer({v.last}, {_heads(o, v.last)}, 3, {options})")
    return o.value(f"{layer}({v}, {memory})", v.shape)


@operation(ranks=(2,))
def packed_projection(o: Program, v: Value) -> Value:
    layer = o.module(f"nn.Linear({v.last}, {3 * v.last}{o.maybe(', bias=False')})")
    o.forward.append(f"query, key, value = {layer}({v}).chunk(3, -1)")
    causal = o.maybe(", is_causal=True", 3)
    return o.value(f"F.scaled_dot_product_attention(query, key, value{causal})", v.shape)
