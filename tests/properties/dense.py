"""Products with a matrix: linear layers, matmul on either side, batched products, einsum, bilinear."""

from __future__ import annotations

from properties.program import Program, Value, operation

_EQUATIONS = {
    1: ("bd,dp->bp", "bd,pd,p->bp", "bd,d->bd"),
    2: ("btd,dp->btp", "btd,tdp->btp", "btd,pt->bpd", "btd,td->bd", "btd,dp,pq->btq"),
    3: ("bhtd,hdp->bhtp", "bhtd,dt->bh", "bhtd,hp->bpd"),
}


@operation(anywhere=True)
def linear(o: Program, v: Value) -> Value:
    p = o.size()
    layer = o.module(f"nn.Linear({v.last}, {p}{o.maybe(', bias=False', 4)})")
    return o.value(f"{layer}({v})", (*v.shape[:-1], p), v.layout, fresh=True)


@operation(anywhere=True)
def functional_linear(o: Program, v: Value) -> Value:
    p = o.size()
    bias = o.fill(o.maybe(", <p>"), p=p)
    weight = o.fill(o.mode("<p, d>", "<d, p>.t()"), p=p, d=v.last)
    return o.value(f"F.linear({v}, {weight}{bias})", (*v.shape[:-1], p), v.layout, fresh=True)


@operation(anywhere=True)
def square_linear_twice(o: Program, v: Value) -> Value:
    layer = o.module(f"nn.Linear({v.last}, {v.last})")
    return o.value(f"F.linear({layer}({v}).tanh(), {layer}.weight)", v.shape, v.layout, fresh=True)


@operation(anywhere=True)
def times_matrix(o: Program, v: Value) -> Value:
    p = o.size()
    form = o.mode("{} @ {}", "torch.matmul({}, {})", "{}.matmul({})")
    return o.value(form.format(v, o.parameter(v.last, p)), (*v.shape[:-1], p), v.layout, fresh=True)


@operation(ranks=(2, 3), anywhere=True)
def times_vector(o: Program, v: Value) -> Value:
    product = o.value(f"({v} @ {o.parameter(v.last)}).unsqueeze(-1)", (*v.shape[:-1], 1), v.layout)
    return product


@operation(ranks=(1,))
def mm(o: Program, v: Value) -> Value:
    p = o.size()
    form = o.mode("torch.mm({}, {})", "{}.mm({})", "torch.mm({1}.t(), {0}.t()).t()")
    return o.value(form.format(v, o.parameter(v.last, p)), (p,), fresh=True)


@operation(ranks=(1,))
def mv(o: Program, v: Value) -> Value:
    return o.value(f"torch.mv({v}, {o.parameter(v.last)}).unsqueeze(1)", (1,))


@operation(ranks=(2, 3))
def matrix_times(o: Program, v: Value) -> Value:
    rows = o.size()
    return o.value(f"{o.parameter(rows, v.shape[-2])} @ {v}", (*v.shape[:-2], rows, v.last), fresh=True)


@operation(ranks=(3,))
def a_matrix_for_each_head(o: Program, v: Value) -> Value:
    p = o.size()
    return o.value(f"torch.matmul({v}, {o.parameter(v.shape[0], v.last, p)})", (*v.shape[:-1], p))


@operation(ranks=(2,))
def a_matrix_for_each_row(o: Program, v: Value) -> Value:
    p = o.size()
    return o.value(f"({v}.unsqueeze(-2) @ {o.parameter(v.shape[0], v.last, p)}).squeeze(-2)", (v.shape[0], p))


@operation(ranks=(2,))
def bmm_over_rows(o: Program, v: Value) -> Value:
    p = o.size()
    x, weight = o.relayout(v, "second"), o.parameter(v.shape[0], v.last, p)
    bias = o.fill(o.mode("", "<p>", "<t, 1, p>"), t=v.shape[0], p=p)
    options = o.maybe(", beta=0.5, alpha=2", 3)
    code = f"torch.baddbmm({bias}, {x}, {weight}{options})" if bias else f"torch.bmm({x}, {weight})"
    return o.value(code, (v.shape[0], p), "second")


@operation(ranks=(2,))
def bmm_of_an_expanded_matrix(o: Program, v: Value) -> Value:
    p = o.size()
    return o.value(f"torch.bmm({v}, {o.parameter(v.last, p)}.expand(B, -1, -1))", (v.shape[0], p))


@operation(ranks=(1,))
def addmm(o: Program, v: Value) -> Value:
    p = o.size()
    options = o.maybe(", beta=0.5, alpha=2", 3)
    return o.value(f"torch.addmm({o.parameter(p)}, {v}, {o.parameter(v.last, p)}{options})", (p,), fresh=True)


@operation(ranks=(1, 2, 3))
def einsum(o: Program, v: Value) -> Value:
    equation = o.pick(_EQUATIONS[v.rank])
    operands, result = equation.split("->")
    first, *others = operands.split(",")
    sizes = {"p": o.size(), "q": 2} | dict(zip(first[1:], v.shape, strict=True))
    parameters = [o.parameter(*(sizes[letter] for letter in letters)) for letters in others]
    code = f'torch.einsum("{equation}", {", ".join([v.name, *parameters])})'
    return o.value(code, [sizes[letter] for letter in result[1:]])


@operation(ranks=(1, 2))
def einsum_parameter_first(o: Program, v: Value) -> Value:
    p = o.size()
    return o.value(f'torch.einsum("pd,b...d->b...p", {o.parameter(p, v.last)}, {v})', (*v.shape[:-1], p))


@operation(ranks=(1, 2, 3), anywhere=True)
def tensordot(o: Program, v: Value) -> Value:
    p = o.size()
    return o.value(f"torch.tensordot({v}, {o.parameter(v.last, p)}, dims=1)", (*v.shape[:-1], p), v.layout)


@operation(anywhere=True)
def bilinear(o: Program, v: Value) -> Value:
    p, right = o.size(), o.other(v)
    layer = o.module(f"nn.Bilinear({v.last}, {right.last}, {p}{o.maybe(', bias=False')})")
    return o.value(f"{layer}({v}, {right})", (*v.shape[:-1], p), v.layout)


@operation(ranks=(1,))
def examples_last(o: Program, v: Value) -> Value:
    p = o.size()
    bias = o.fill(o.maybe(" + <p, 1>"), p=p)
    return o.value(f"({o.parameter(p, v.last)} @ {v}.T{bias}).T", (p,))


@operation(anywhere=True)
def checkpointed_linear(o: Program, v: Value) -> Value:
    layer = o.module(f"nn.Linear({v.last}, {v.last})")
    code = f"torch.utils.checkpoint.checkpoint({layer}, {v}, use_reentrant=False)"
    return o.value(code, v.shape, v.layout)
