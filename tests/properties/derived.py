"""Parameters that meet the examples only after other operations: slices, low rank, weight norm, tables, FFT, tokens."""

from __future__ import annotations

from properties.program import Program, Value, operation

_WEIGHTS = (  # and their rows; 0 stands for d
    ("<n, d>[:{d}]", 0),
    ("<d, d>.tril()", 0),
    ("torch.softmax(<d, d>, -1)", 0),
    ("<d, d> * torch.eye({d}, dtype={x}.dtype)", 0),
    ("torch.cat([<1, d>, <2, d>])", 3),
    ("torch.outer(<d>, <d>)", 0),
    ("<s>.view({d}, {d}).t()", 0),
    ("torch.stack([<d>, <d>])", 2),
    ("<d, d>.flip(0).cumsum(1)", 0),
    ("F.dropout(<d, d>, 0.3, self.training)", 0),
    ("torch.matrix_exp(0.3 * <d, d>)", 0),
    ("<d, d, 2>[..., 0]", 0),
)
_FOURIER = (
    "torch.fft.fft({x} * <d>).real",
    "torch.fft.fft({x}).real * <d>",
    "torch.fft.irfft(torch.fft.rfft({x}) * torch.fft.rfft(<d>), n={d})",
    "torch.fft.irfft(torch.fft.rfft({x}) * torch.view_as_complex(<h, 2>), n={d})",
    "torch.fft.irfft(torch.fft.rfft({x}) * <h>, n={d})",
)
_MASKED = (
    "torch.where({x} > 0, {x}, <d>.expand_as({x}))",
    "{x}.masked_fill({x} > 0, 0.0) + <d>.masked_fill(torch.arange({d}) == 0, 0.0)",
    "<d>.expand_as({x}).masked_fill({x} > 0, 0.0)",
)


@operation(anywhere=True)
def low_rank(o: Program, v: Value) -> Value:
    p = o.size()
    down, up, base = o.parameter(2, v.last), o.parameter(p, 2), o.parameter(p, v.last)
    form = o.mode("{base} + {up} @ {down}", "{up} @ {down}", "{base} - 0.5 * torch.mm({up}, {down})")
    return o.value(f"F.linear({v}, {form.format(up=up, down=down, base=base)})", (*v.shape[:-1], p), v.layout)


@operation(anywhere=True)
def adapter(o: Program, v: Value) -> Value:
    base = o.module(f"nn.Linear({v.last}, {v.last})")
    down = o.module(f"nn.Linear({v.last}, 2, bias=False)")
    up = o.module(f"nn.Linear(2, {v.last}, bias=False)")
    return o.value(f"{base}({v}) + 0.5 * {up}({down}({v}))", v.shape, v.layout)


@operation(anywhere=True)
def weight_norm(o: Program, v: Value) -> Value:
    p = o.size()
    if o.chance(2):
        layer = o.module(f"torch.nn.utils.parametrizations.weight_norm(nn.Linear({v.last}, {p}))")
        return o.value(f"{layer}({v})", (*v.shape[:-1], p), v.layout)
    g, direction = o.parameter(p, 1), o.parameter(p, v.last, positive=True)
    weight = f"{g} * {direction} / {direction}.norm(dim=1, keepdim=True)"
    return o.value(f"F.linear({v}, {weight})", (*v.shape[:-1], p), v.layout)


@operation(anywhere=True)
def made_weight(o: Program, v: Value) -> Value:
    form, rows = o.pick(_WEIGHTS)
    d = v.last
    weight = o.fill(form, d=d, n=2 * d, s=d * d).format(d=d, x=v)
    return o.value(f"F.linear({v}, {weight})", (*v.shape[:-1], rows or d), v.layout)


@operation(ranks=(2, 3))
def position_table(o: Program, v: Value) -> Value:
    rows = v.shape[0] + o.pick((0, 1))
    tail = v.shape[1:]
    if v.rank == 2 and o.chance(2):
        table = o.module(f"nn.Embedding({rows}, {v.last})")
        return o.value(f"{v} + {table}(torch.arange({v.shape[0]}))", v.shape)
    table = o.parameter(rows, *tail)
    form = o.mode("{t}[:{n}]", "{t}[None, :{n}]", "{t}[torch.arange({n})]", "{t}[:{n}].unsqueeze(0).expand(B, *{s})")
    return o.value(f"{v} + {form.format(t=table, n=v.shape[0], s=(-1,) * v.rank)}", v.shape)


@operation(ranks=(2,))
def position_table_in_rows(o: Program, v: Value) -> Value:
    layout = o.mode("second", "major", "minor")
    x, table = o.relayout(v, layout), o.parameter(*v.shape)
    form = {"second": f"{table}[:, None]", "major": f"{table}.repeat(B, 1)"}
    form["minor"] = f"{table}.repeat_interleave(B, 0)"
    return o.value(f"{x} + {form[layout]}", v.shape, layout)


@operation(ranks=(2,))
def class_token(o: Program, v: Value) -> Value:
    token, shape = o.parameter(1, 1, v.last), (v.shape[0] + 1, v.last)
    if o.chance(3):
        return o.value(f"torch.cat([{o.relayout(v, 'second')}, {token}.expand(-1, B, -1)], 0)", shape, "second")
    parts = o.pick((f"{token}.expand(B, -1, -1), {v}", f"{v}, {token}.repeat(B, 1, 1)"))
    return o.value(f"torch.{o.mode('cat', 'concat')}([{parts}], {o.mode('1', 'dim=1')})", shape)


@operation(ranks=(1,))
def stacked_token(o: Program, v: Value) -> Value:
    token = o.parameter(v.last)
    form = o.mode("torch.stack([{x}, {p}.expand(B, -1)], 1)", "torch.stack([{p}.expand_as({x}), {x}], dim=1)")
    return o.value(form.format(x=v, p=token), (2, v.last))


@operation(ranks=(1, 2))
def fourier(o: Program, v: Value) -> Value:
    form = o.fill(o.pick(_FOURIER), d=v.last, h=v.last // 2 + 1)
    return o.value(form.format(x=v, d=v.last), v.shape)


@operation(ranks=(1, 2, 3))
def masked_fill(o: Program, v: Value) -> Value:
    return o.value(o.fill(o.pick(_MASKED), d=v.last).format(x=v, d=v.last), v.shape)


@operation(ranks=(1,))
def mixture(o: Program, v: Value) -> Value:
    experts = o.parameter(2, v.last, v.last)
    gate = o.module(f"nn.Linear({v.last}, 2)")
    return o.value(f'torch.einsum("be,edp,bd->bp", {gate}({v}).softmax(-1), {experts}, {v})', v.shape)


@operation(ranks=(1,))
def weight_chosen_by_data(o: Program, v: Value) -> Value:
    ids, p = o.ids(()), o.size()
    weight = f"{o.parameter(ids.high, p, v.last)}[{ids}]"
    return o.value(f"torch.bmm({weight}, {v}.unsqueeze(-1)).squeeze(-1)", (p,))


@operation(ranks=(1, 2))
def distance(o: Program, v: Value) -> Value:
    centres = o.parameter(3, v.last)
    x = f"{v}.unsqueeze(-2)"
    return o.value(f"({x} - {centres}).square().sum(-1)", (*v.shape[:-1], 3))
