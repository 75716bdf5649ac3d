"""Parameters looked up by data: embeddings, bags, indexing, gather, one-hot, tied tables, ragged rows."""

from __future__ import annotations

from properties.program import Program, Value, operation


@operation(ranks=(0, 1, 2), ids=True)
def embedding(o: Program, v: Value) -> Value:
    p = o.size()
    option = o.mode("", "", ", padding_idx=1", ", padding_idx=-1", ", max_norm=1.0", ", scale_grad_by_freq=True")
    table = o.module(f"nn.Embedding({v.high}, {p}{option})")
    return o.value(f"{table}({v})", (*v.shape, p))


@operation(ranks=(1, 2), ids=True)
def embedding_elsewhere(o: Program, v: Value) -> Value:
    p = o.size()
    layout = o.mode("second", "major", "minor")
    ids = o.relayout(v, layout)
    form = o.mode("F.embedding({1}, {0})", "{0}[{1}]")
    return o.value(form.format(o.parameter(v.high, p), ids), (*v.shape, p), layout)


@operation(ranks=(0, 1, 2), ids=True)
def indexing(o: Program, v: Value) -> Value:
    p = o.size()
    table = o.parameter(v.high, p)
    forms = [f"F.embedding({v}, {table})", f"{table}[{v}]", f"F.one_hot({v}, {v.high}).to({table}.dtype) @ {table}"]
    forms.append(f"{table}.index_select(0, {v}.flatten()).unflatten(0, {v}.shape)")
    return o.value(o.pick(forms), (*v.shape, p))


@operation(ranks=(1,), ids=True)
def index_of_the_second_axis(o: Program, v: Value) -> Value:
    p = o.size()
    return o.value(f"{o.parameter(p, v.high)}[:, {v}]", (p, *v.shape), "second")


@operation(ranks=(1,), ids=True)
def gather(o: Program, v: Value) -> Value:
    table = o.parameter(v.high)
    expanded = f"{table}.expand(B, -1)"
    forms = [f"torch.gather({expanded}, 1, {v})", f"torch.take({table}, {v})", f"{expanded}.take_along_dim({v}, 1)"]
    return o.value(o.pick(forms), v.shape)


@operation(ranks=(1,), ids=True)
def two_indices(o: Program, v: Value) -> Value:
    second = o.ids(v.shape, v.high)
    return o.value(f"{o.parameter(v.high, v.high)}[{v}, {second}]", v.shape)


@operation(ranks=(1,), ids=True)
def embedding_bag(o: Program, v: Value) -> Value:
    p = o.size()
    mode = o.mode("sum", "mean", "max")
    bag = o.module(f"nn.EmbeddingBag({v.high}, {p}, mode='{mode}'{o.maybe(', padding_idx=0', 4)})")
    if mode == "sum" and o.chance(2):
        weights = o.add_input(*v.shape)
        return o.value(f"{bag}({v}, per_sample_weights={weights})", (p,))
    offsets = f"torch.arange(0, {v}.numel(), {v.last})"
    return o.value(o.pick((f"{bag}({v})", f"{bag}({v}.flatten(), {offsets})")), (p,))


@operation(ranks=(0, 1), ids=True)
def tied_table(o: Program, v: Value) -> Value:
    table = o.parameter(v.high, o.size())
    return o.value(f"F.embedding({v}, {table}).tanh() @ {table}.T", (*v.shape, v.high))


@operation(ranks=(0, 1), ids=True)
def tied_modules(o: Program, v: Value) -> Value:
    p = o.size()
    table = o.module(f"nn.Embedding({v.high}, {p})")
    head = o.module(f"nn.Linear({p}, {v.high}, bias=False)")
    o.setup.append(f"{head}.weight = {table}.weight")
    return o.value(f"{head}({table}({v}).tanh())", (*v.shape, v.high))


@operation(ranks=(2,))
def index_a_table_beside(o: Program, v: Value) -> Value:
    ids = o.ids((v.shape[0],))
    return o.value(f"{v} + {o.parameter(ids.high, v.last)}[{ids}]", v.shape)


@operation(ranks=(2,))
def ragged_rows(o: Program, v: Value) -> Value:
    ids, p = o.ids((v.shape[0],)), o.size()
    layer = o.module(f"nn.Linear({v.last}, {p})")
    o.forward.append(f"mask = {ids} > 0")
    rows = o.value(f"{v}.new_zeros(B, {v.shape[0]}, {p})", (v.shape[0], p))
    return o.value(f"{rows}.index_put((mask,), {layer}({v}[mask]))", (v.shape[0], p))


@operation(ranks=(1, 2, 3))
def reordered_examples(o: Program, v: Value) -> Value:
    layer = o.module(f"nn.Linear({v.last}, {v.last})")
    o.forward.append("order = torch.arange(B).roll(1)")
    return o.value(f"{layer}({v}[order])[order.argsort()]", v.shape)
