"""LSTM, GRU and Elman networks, recorded as the linear maps and pointwise steps they are made of.

Torch runs a whole recurrent layer as one operation. Here it is unrolled: the input's gates are one linear map of all
time steps, the state's gates one linear map a step, so that each weight's gradient is the linear rule's. Legend:
T steps, B examples, H hidden features; gates of an LSTM are i, f, g, o, of a GRU r, z, n (torch.nn.LSTM, torch.nn.GRU).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dither.rules.rule import register_decomposition

State = tuple[Tensor, ...]
"""(h,), or (h, c) of an LSTM; each (B, H)."""

Cell = Callable[[Tensor, State, Sequence[Any]], State]
"""From the input's gates (B, gates * H), the state and the weights [w_ih, w_hh, b_ih, b_hh, w_hr] to the next state."""


def lstm_step(gates_in: Tensor, state: State, weights: Sequence[Any]) -> State:
    """One step of an LSTM, with a projection of h if there is one (Sak et al. 2014, arXiv:1402.1128)."""
    h, c = state
    i, f, g, o = (gates_in + F.linear(h, weights[1], weights[3])).chunk(4, -1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    h = o.sigmoid() * c.tanh()
    return (h if weights[4] is None else F.linear(h, weights[4])), c


def gru_step(gates_in: Tensor, state: State, weights: Sequence[Any]) -> State:
    """One step of a GRU, the reset gate applied after the state's linear map."""
    (h,) = state
    r_in, z_in, n_in = gates_in.chunk(3, -1)
    r_h, z_h, n_h = F.linear(h, weights[1], weights[3]).chunk(3, -1)
    z = (z_in + z_h).sigmoid()
    n = (n_in + (r_in + r_h).sigmoid() * n_h).tanh()
    return (n + z * (h - n),)


def elman_step(activation: Callable[[Tensor], Tensor], gates_in: Tensor, state: State, weights: Sequence[Any]) -> State:
    """One step of a plain recurrent network."""
    return (activation(gates_in + F.linear(state[0], weights[1], weights[3])),)


def layer(cell: Cell, *args: Any) -> tuple[Tensor, ...]:
    """A stack of recurrent layers: torch's `_VF.lstm` and its kin, padded or packed; returns (output, h_n[, c_n])."""
    if isinstance(args[3], (list, tuple)):
        x, batch_sizes, hx, params, has_biases, depth, dropout, train, bidirectional = args
        sizes, batch_first = batch_sizes.tolist(), False
    else:
        x, hx, params, has_biases, depth, dropout, train, bidirectional, batch_first = args
        sizes = None
    states = tuple(hx) if isinstance(hx, (list, tuple)) else (hx,)
    weights = _by_layer(params, has_biases, depth * (2 if bidirectional else 1))
    ends: list[State] = []
    for level in range(depth):
        directions = []
        for reverse in (False, True) if bidirectional else (False,):
            number = len(ends)
            gates = F.linear(x, weights[number][0], weights[number][2])
            steps = gates.split(sizes) if sizes else gates.unbind(1 if batch_first and level == 0 else 0)
            start = tuple(_of_the_examples(state[number], steps) for state in states)
            outputs, end = _scan(cell, weights[number], steps, start, reverse)
            directions.append(torch.cat(outputs) if sizes else torch.stack(outputs))
            ends.append(end)
        x = torch.cat(directions, -1) if bidirectional else directions[0]
        if dropout and train and level < depth - 1:
            x = torch.dropout(x, dropout, train)
    last = tuple(torch.stack([end[part] for end in ends]) for part in range(len(states)))
    return (x.transpose(0, 1) if batch_first else x, *last)


def _by_layer(params: Sequence[Tensor], has_biases: bool, count: int) -> list[list[Any]]:
    """The flat parameters by layer and direction, as [w_ih, w_hh, b_ih, b_hh, w_hr]."""
    each = len(params) // count
    found = []
    for first in range(0, len(params), each):
        own: list[Any] = list(params[first : first + each])
        biases = own[2:4] if has_biases else [None, None]
        projection = own[4 if has_biases else 2 :] or [None]
        found.append([*own[:2], *biases, *projection])
    return found


def _of_the_examples(state: Tensor, steps: Sequence[Tensor]) -> Tensor:
    """The first state as one that varies with the examples as their gates do, also if it is zeros made inside."""
    gates = steps[0][:, :1]
    return torch.where(torch.zeros_like(gates, dtype=torch.bool), gates, state)


def _scan(
    cell: Cell, weights: Sequence[Any], steps: Sequence[Tensor], start: State, reverse: bool
) -> tuple[list[Tensor], State]:
    """Run over the steps; a step of fewer rows (packed, longest first) goes on with the first rows of the state."""
    outputs: list[Tensor] = []
    ended: list[State] = []
    state = start
    for gates in reversed(steps) if reverse else steps:
        rows, have = len(gates), len(state[0])
        if not outputs and reverse and rows < have:
            state = tuple(s[:rows] for s in state)
        elif rows < have:
            ended.append(tuple(s[rows:] for s in state))
            state = tuple(s[:rows] for s in state)
        elif rows > have:
            state = tuple(torch.cat([s, first[have:rows]]) for s, first in zip(state, start, strict=True))
        state = cell(gates, state, weights)
        outputs.append(state[0])
    if ended:
        parts = [state, *reversed(ended)]
        state = tuple(torch.cat(part) for part in zip(*parts, strict=True))
    return (outputs[::-1] if reverse else outputs), state


_OF_A_CELL = ("input", "hx", "w_ih", "w_hh", "b_ih", "b_hh")


def step(cell: Cell, *args: Any, **named: Any) -> Any:
    """One step of a cell: torch's `_VF.lstm_cell` and its kin."""
    given: list[Any] = [*args, *(named.get(name) for name in _OF_A_CELL[len(args) :])]
    x, hx, *weights = given
    state = tuple(hx) if isinstance(hx, (list, tuple)) else (hx,)
    own = [*weights, None]
    gates = F.linear(x, own[0], own[2])
    found = cell(gates, tuple(_of_the_examples(s, [gates]) for s in state), own)
    return found if len(found) > 1 else found[0]


for _name, _cell in (
    ("lstm", lstm_step),
    ("gru", gru_step),
    ("rnn_tanh", partial(elman_step, torch.tanh)),
    ("rnn_relu", partial(elman_step, torch.relu)),
):
    register_decomposition(getattr(torch, _name), partial(layer, _cell))
    register_decomposition(getattr(torch, f"{_name}_cell"), partial(step, _cell))
