"""Operations without parameters: activations, joins, other layouts, views and reductions of one example's axes."""

from __future__ import annotations

from math import prod

from properties.program import LAYOUTS, Operation, Program, Value, operation

STRUCTURE: list[Operation] = []
_ACTIVATIONS = ("F.relu({})", "{}.tanh()", "F.gelu({})", "F.silu({})", "{}.sigmoid()", "{}.softmax(-1)", "F.elu({})")


@operation(anywhere=True, into=STRUCTURE)
def activation(o: Program, v: Value) -> Value:
    return o.value(o.pick(_ACTIVATIONS).format(v), v.shape, v.layout)


@operation(anywhere=True, into=STRUCTURE)
def activation_in_place(o: Program, v: Value) -> Value:
    form = o.mode("{}.relu_()", "F.leaky_relu_({})", "{}.mul_(0.5)", "{}.tanh_()", "F.relu({}, inplace=True)")
    return o.value(form.format(o.overwrite(v)), v.shape, v.layout)


@operation(anywhere=True, into=STRUCTURE)
def join(o: Program, v: Value) -> Value:
    """Two branches, or a value with itself."""
    form = o.mode("{} + {}", "{} * {}", "({} - {}.tanh())")
    return o.value(form.format(v, o.other(v)), v.shape, v.layout)


@operation(anywhere=True, into=STRUCTURE)
def join_in_place(o: Program, v: Value) -> Value:
    other = o.other(v)
    return o.value(f"{o.overwrite(v)}.add_({other}.tanh())", v.shape, v.layout)


@operation(into=STRUCTURE)
def join_features(o: Program, v: Value) -> Value:
    other = o.other(v, same_shape=False)
    features = prod(v.shape) + prod(other.shape)
    return o.value(f"torch.cat([{v}.flatten(1), {other}.flatten(1)], 1)", (features,))


@operation(ranks=(1, 2, 3), into=STRUCTURE)
def stack(o: Program, v: Value) -> Value:
    return o.value(f"torch.stack([{v}, {o.other(v)}], 1)", (2, *v.shape))


@operation(ranks=(2, 3, 4), anywhere=True, into=STRUCTURE)
def other_layout(o: Program, v: Value) -> Value:
    return o.relayout(v, o.pick(LAYOUTS[1:]))


@operation(ranks=(1, 2), into=STRUCTURE)
def rows_of_an_example(o: Program, v: Value) -> Value:
    """k noisy rows of each example."""
    k = o.pick((2, o.batch))
    code, layout = o.pick(((f"{v}.repeat_interleave({k}, 0)", "major"), (f"torch.cat([{v}] * {k})", "minor")))
    rows = Value(o.value(code, v.shape).name, (k, *v.shape), layout)
    noise = f"torch.arange(1, {k + 1})"
    noise += ".repeat(B)" if layout == "major" else ".repeat_interleave(B)"
    return o.value(f"{rows} * {noise}.view(-1{', 1' * v.rank}).to({rows}.dtype)", rows.shape, layout)


@operation(ranks=(2, 3, 4), into=STRUCTURE)
def swap_axes(o: Program, v: Value) -> Value:
    shape = (*v.shape[:-2], v.shape[-1], v.shape[-2])
    return o.value(f"{v}.mT{o.maybe('.contiguous()')}", shape)


@operation(ranks=(2, 3, 4), into=STRUCTURE)
def reduce(o: Program, v: Value) -> Value:
    axis = o.random.randint(1, v.rank)
    shape = v.shape[: axis - 1] + v.shape[axis:]
    form = o.mode(f"{v}.mean({axis})", f"{v}.sum({axis})", f"{v}.amax({axis})", f"{v}.select({axis}, 0)")
    return o.value(form, shape)


@operation(into=STRUCTURE)
def smaller(o: Program, v: Value) -> Value:
    return o.value(f"{v}.flatten(1)[:, :4]", (min(4, prod(v.shape)),))


@operation(ranks=(2, 3, 4), into=STRUCTURE)
def flatten(o: Program, v: Value) -> Value:
    return o.value(f"{v}.flatten(1)", (prod(v.shape),))


@operation(ranks=(1, 2, 3), into=STRUCTURE)
def unsqueeze(o: Program, v: Value) -> Value:
    axis = o.random.randint(1, v.rank + 1)
    return o.value(f"{v}.unsqueeze({axis})", (*v.shape[: axis - 1], 1, *v.shape[axis - 1 :]))


@operation(anywhere=True, into=STRUCTURE)
def dropout(o: Program, v: Value) -> Value:
    # A mask is drawn in the order of memory, in which an attention kernel may leave its output otherwise than another.
    module, rows = o.module("nn.Dropout(0.4)"), f"{v}.contiguous()"
    return o.value(o.mode(f"F.dropout({rows}, 0.4, self.training)", f"{module}({rows})"), v.shape, v.layout)


@operation(ranks=(2, 3), into=STRUCTURE)
def within_an_example(o: Program, v: Value) -> Value:
    form = o.mode(".flip(1)", ".roll(1, 1)", ".cumsum(1)", ".sort(1).values", ".softmax(1)", " @ {0}.mT @ {0}")
    return o.value(f"{v}{form.format(v)}", v.shape)


@operation(ranks=(2, 3), into=STRUCTURE)
def pad_or_pool(o: Program, v: Value) -> Value:
    last = v.last + 1
    form = o.mode("F.pad({}, (1, 0))", "F.avg_pool1d({}, 2, 1, 1)" if v.rank == 2 else "F.pad({}, (0, 1))")
    return o.value(form.format(v), (*v.shape[:-1], last))
