"""Recurrent layers and cells."""

from __future__ import annotations

from properties.program import Program, Value, operation


@operation(ranks=(2,))
def recurrent_layer(o: Program, v: Value) -> Value:
    hidden, layout = o.pick((o.width, 2, o.batch)), o.mode("first", "second")
    x = o.relayout(v, layout)
    directions, layers = o.pick((1, 1, 2)), o.pick((1, 1, 2))
    options = (
        f"{v.last}, {hidden}, num_layers={layers}, batch_first={layout == 'first'}, bidirectional={directions == 2}"
    )
    layer = o.module(f"nn.{o.mode('LSTM', 'GRU', 'RNN')}({options}{o.maybe(', bias=False', 4)})")
    return o.value(f"{layer}({x})[0]", (v.shape[0], directions * hidden), layout)


@operation(ranks=(2,))
def last_state(o: Program, v: Value) -> Value:
    hidden = o.pick((o.width, 2, o.batch))
    layer = o.module(f"nn.{o.mode('GRU', 'RNN')}({v.last}, {hidden}, batch_first=True)")
    return o.value(f"{layer}({v})[1][0]", (hidden,))


@operation(ranks=(2,))
def learned_first_state(o: Program, v: Value) -> Value:
    hidden = o.pick((o.width, 2))
    layer = o.module(f"nn.GRU({v.last}, {hidden}, batch_first=True)")
    state = f"{o.parameter(1, 1, hidden)}.expand(-1, B, -1).contiguous()"
    return o.value(f"{layer}({v}, {state})[0]", (v.shape[0], hidden))


@operation(ranks=(2,))
def loop_over_a_cell(o: Program, v: Value) -> Value:
    hidden = o.pick((o.width, 2))
    kind = o.mode("GRUCell", "RNNCell", "LSTMCell")
    cell = o.module(f"nn.{kind}({v.last}, {hidden})")
    state = o.value(f"{v}.new_zeros(B, {hidden})", (hidden,))
    if kind == "LSTMCell":
        o.forward.append(f"memory = {state}")
        o.forward.append(f"for step in {v}.unbind(1): {state}, memory = {cell}(step, ({state}, memory))")
    else:
        o.forward.append(f"for step in {v}.unbind(1): {state} = {cell}(step, {state})")
    return state


@operation(ranks=(2,))
def loop_over_a_linear(o: Program, v: Value) -> Value:
    layer = o.module(f"nn.Linear({v.last}, {v.last})")
    state = o.value(f"{v}[:, 0]", (v.last,))
    o.forward.append(f"for step in {v}.unbind(1): {state} = ({layer}({state}) + step).tanh()")
    return state
