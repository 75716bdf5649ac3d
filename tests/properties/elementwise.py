"""A parameter that is added, multiplies or divides by broadcasting in either direction, also in place."""

from __future__ import annotations

from properties.program import Program, Value, operation

_EITHER = ("{x} + {p}", "{p} + {x}", "{x} * {p}", "{p} * {x}", "{x} - {p}", "{p} - {x}", "torch.add({x}, {p}, alpha=3)")
_OTHERS = (
    "torch.lerp({x}, {x}.tanh(), {p})",
    "torch.addcmul({x}, {x}, {p}, value=0.5)",
    "torch.maximum({x}, {p})",
    "torch.where({x} > 0, {x}, {p})",
    "torch.where({x} > 0, {p}, {x})",
    "torch.sub({x}, {p}, alpha=2)",
    "torch.atan2({x}, 1 + {p}.square())",
    "{x}.clamp(min={p})",
    "{x}.sigmoid() ** (1 + {p}.square())",
)
_IN_PLACE = ("{x}.add_({p})", "{x}.mul_({p})", "{x}.sub_({p})", "{x}.add_({p}, alpha=2)", "{x}.addcmul_({p}, {p})")


def broadcast(o: Program, v: Value, positive: bool = False) -> str:
    """A parameter that broadcasts to a value; sometimes with a place for each example."""
    shape = []
    for size in v.sizes:
        if size is None:
            own = v.layout in ("first", "second") and o.chance(16)
            o.removable = o.removable and not own
            shape.append(o.batch if own else 1)
        else:
            shape.append(o.pick((size, size, 1)))
    cut = o.pick((1, 1, 0, len(shape) - 1, len(shape)))
    return o.parameter(*shape[cut:], positive=positive)


@operation(anywhere=True)
def plain(o: Program, v: Value) -> Value:
    code = o.pick(_EITHER).format(x=v, p=broadcast(o, v))
    return o.value(code, v.shape, v.layout)


@operation(anywhere=True)
def other_functions(o: Program, v: Value) -> Value:
    code = o.pick(_OTHERS).format(x=v, p=broadcast(o, v))
    return o.value(code, v.shape, v.layout)


@operation(anywhere=True)
def divide(o: Program, v: Value) -> Value:
    form = o.mode("{x} / {p}", "{p} / (1 + {x}.square())", "torch.div({x}, {p})", "{x}.div({p})")
    return o.value(form.format(x=v, p=broadcast(o, v, positive=True)), v.shape, v.layout)


@operation(anywhere=True)
def in_place(o: Program, v: Value) -> Value:
    code = o.pick(_IN_PLACE).format(x=o.overwrite(v), p=broadcast(o, v))
    return o.value(code, v.shape, v.layout, fresh=True)


@operation(anywhere=True)
def augmented(o: Program, v: Value) -> Value:
    made = o.value(f"{v} * 1", v.shape, v.layout)
    o.forward.append(f"{made} {o.mode('+', '-', '*')}= {broadcast(o, v)}")
    return made


@operation(ranks=(1, 2))
def wider_parameter(o: Program, v: Value) -> Value:
    """The value is broadcast to the parameter."""
    rows, sign = o.pick((o.length, o.batch, 2)), o.mode("+", "*", "-")
    if v.rank == 1:
        code = f"{v}.unsqueeze(1) {sign} {o.parameter(rows, v.last)}"
        return o.value(code, (rows, v.last))
    return o.value(f"{v}.unsqueeze(1) {sign} {o.parameter(rows, 1, v.last)}", (rows, *v.shape))


@operation(ranks=(1, 2))
def wider_parameter_before(o: Program, v: Value) -> Value:
    """The parameter's first axis comes before the examples'."""
    rows, sign = o.pick((o.length, o.batch, 2)), o.mode("+", "*")
    code = f"{o.parameter(rows, *[1] * (v.rank + 1))} {sign} {v}"
    return o.value(code, (rows, *v.shape), "second")


@operation(anywhere=True)
def scalar(o: Program, v: Value) -> Value:
    p = o.parameter()
    return o.value(o.mode(f"{p} * {v}", f"{v} + {p}", f"{p} * {v} + {p}", f"{v} * {p}.exp()"), v.shape, v.layout)


@operation(anywhere=True)
def prelu(o: Program, v: Value) -> Value:
    channels = v.sizes[1] or 1
    layer = o.module(o.pick(("nn.PReLU()", f"nn.PReLU({channels})")))
    return o.value(f"{layer}({v})", v.shape, v.layout)
