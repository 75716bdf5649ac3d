"""Models that are wrong on purpose: one example's loss depends on another example, or the loss is no per-example loss.

Each must be refused by name, unless the mix has no effect (one example, a gate that is closed) and the result equals
the oracle.
"""

from __future__ import annotations

from math import prod

from properties.program import Operation, Program, Value, operation

MIXES: list[Operation] = []


def _mixed(form: str, v: Value, o: Program) -> Value:
    return o.value(form.format(v), v.shape)


@operation(into=MIXES)
def mean_over_the_batch(o: Program, v: Value) -> Value:
    return _mixed(o.mode("{0} - {0}.mean(0)", "{0} * {0}.sum(0, keepdim=True)", "{0} / (1 + {0}.var(0, False))"), v, o)


@operation(into=MIXES)
def roll(o: Program, v: Value) -> Value:
    return _mixed(o.mode("{0} + {0}.roll(1, 0)", "{0} * {0}.flip(0)", "{0}.cumsum(0)", "{0}.sort(0).values"), v, o)


@operation(into=MIXES)
def softmax_over_the_batch(o: Program, v: Value) -> Value:
    return _mixed(o.mode("{0}.softmax(0)", "F.normalize({0}, dim=0)", "{0} - {0}.amax(0)"), v, o)


@operation(into=MIXES)
def batch_norm_in_train_mode(o: Program, v: Value) -> Value | None:
    if o.batch * prod(v.shape[1:]) == 1:
        return None
    dims, track = max(1, v.rank - 1), o.mode("True", "False")
    return _mixed(f"{o.module(f'nn.BatchNorm{dims}d({v.shape[0]}, track_running_stats={track})')}({{0}})", v, o)


@operation(into=MIXES)
def reads_another(o: Program, v: Value) -> Value:
    forms = (
        "{0} + {0}[0]",
        "{0} + 1e-20 * {0}[B - 1]",
        "{0}[torch.zeros(B, dtype=torch.long)]",
        "{0} + {0}[:1].detach()",
    )
    return _mixed(o.pick((*forms, "torch.cat([{0}[:1], {0}[1:] + {0}[:-1]])")), v, o)


@operation(into=MIXES)
def similarities(o: Program, v: Value) -> Value:
    return _mixed("(({0}.flatten(1) @ {0}.flatten(1).T).softmax(1) @ {0}.flatten(1)).view_as({0})", v, o)


@operation(ranks=(2, 3), into=MIXES)
def scrambled_rows(o: Program, v: Value) -> Value:
    return _mixed(o.mode("{0}.transpose(0, 1).reshape({0}.shape)", "{0}.flatten().flip(0).view_as({0})"), v, o)


@operation(ranks=(2,), into=MIXES)
def attention_over_the_batch(o: Program, v: Value) -> Value:
    layer = o.module(f"nn.MultiheadAttention({v.last}, 1)")
    return _mixed(f"{layer}({{0}}, {{0}}, {{0}}, need_weights=False)[0]", v, o)


@operation(ranks=(2,), into=MIXES)
def recurrence_over_the_batch(o: Program, v: Value) -> Value:
    return _mixed(f"{o.module(f'nn.RNN({v.last}, {v.last})')}({{0}})[0]", v, o)


@operation(ranks=(1,), into=MIXES)
def convolution_over_the_batch(o: Program, v: Value) -> Value:
    weight = o.parameter(1, 1, 3)
    return _mixed(f"F.conv1d({{0}}.T.unsqueeze(1), {weight}, padding=1).squeeze(1).T", v, o)


@operation(ranks=(1,), into=MIXES)
def matrix_over_the_batch(o: Program, v: Value) -> Value:
    o.removable = False
    return _mixed(f"{o.parameter(o.batch, o.batch)} @ {{0}}", v, o)


WRONG_LOSSES = {
    "scalar loss": "({}).sum()",
    "mean loss": "({}).mean()",
    "two losses an example": "torch.stack([{0}, {0}], 1)",
    "losses that sum": "({0}) + ({0}).mean()",
    "losses that weigh": "({0}) * ({0}).detach().softmax(0)",
    "losses rolled": "({}).roll(1, 0)",
}
