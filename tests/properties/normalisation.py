"""Normalisation layers with affine parameters, of modules and of raw parameters."""

from __future__ import annotations

from math import prod

from properties.program import Program, Value, operation


@operation(anywhere=True)
def layer_norm(o: Program, v: Value) -> Value:
    most = v.rank if v.layout == "first" else v.rank - 1
    shape = v.shape[-o.random.randint(1, most) :]
    layer = o.module(f"nn.LayerNorm({list(shape)}{o.maybe(', bias=False', 4)})")
    return o.value(f"{layer}({v})", v.shape, v.layout)


@operation(anywhere=True)
def raw_layer_norm(o: Program, v: Value) -> Value:
    weight, bias = o.parameter(v.last), o.parameter(v.last)
    form = o.mode(f"{weight}, {bias}", f"weight={weight}, bias={bias}, eps=1e-3", f"weight={weight}", f"bias={bias}")
    return o.value(f"F.layer_norm({v}, [{v.last}], {form})", v.shape, v.layout)


@operation(anywhere=True)
def rms_norm(o: Program, v: Value) -> Value:
    layer = o.module(f"nn.RMSNorm({v.last}, eps={o.pick((1e-2, 1e-3))})")  # the default divides zeros by 1e-8
    return o.value(f"{layer}({v})", v.shape, v.layout)


@operation()
def group_norm(o: Program, v: Value) -> Value | None:
    groups = o.pick([n for n in range(1, v.shape[0] + 1) if v.shape[0] % n == 0])
    if prod(v.shape) // groups == 1:
        return None
    return o.value(f"{o.module(f'nn.GroupNorm({groups}, {v.shape[0]})')}({v})", v.shape)


@operation(ranks=(3,))
def group_norm_of_frames(o: Program, v: Value) -> Value | None:
    if v.shape[1] * v.shape[2] == 1:
        return None
    rows = o.relayout(v, o.mode("major", "minor"))
    return o.value(f"{o.module(f'nn.GroupNorm(1, {v.shape[1]})')}({rows})", v.shape, rows.layout)


@operation(ranks=(2, 3, 4))
def instance_norm(o: Program, v: Value) -> Value | None:
    if prod(v.shape[1:]) == 1:
        return None
    layer = o.module(f"nn.InstanceNorm{v.rank - 1}d({v.shape[0]}, affine=True)")
    return o.value(f"{layer}({v})", v.shape)


@operation()
def batch_norm_in_eval(o: Program, v: Value) -> Value:
    dims = max(1, v.rank - 1)
    return o.value(f"{o.module(f'nn.BatchNorm{dims}d({v.shape[0]}).eval()')}({v})", v.shape)


@operation(ranks=(2, 3, 4))
def local_response_norm(o: Program, v: Value) -> Value:
    return o.value(f"F.local_response_norm({v}.contiguous(), 2) * {o.parameter(v.last)}", v.shape)


@operation(anywhere=True)
def normalised_and_scaled(o: Program, v: Value) -> Value:
    return o.value(f"F.normalize({v}, dim=-1, eps=1e-2) * {o.parameter(v.last)}", v.shape, v.layout)


@operation(ranks=(1, 2))
def adaptive_norm(o: Program, v: Value) -> Value:
    layer = o.module(f"nn.Linear({v.last}, {2 * v.last})")
    condition = o.value(f"{layer}({v if v.rank == 1 else f'{v}.mean(1)'})", (2 * v.last,))
    o.forward.append(f"scale, shift = {condition}{'' if v.rank == 1 else '.unsqueeze(1)'}.chunk(2, -1)")
    return o.value(f"F.layer_norm({v}, [{v.last}]) * (1 + scale) + shift", v.shape)
