"""Recurrent layers and cells."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from case_registry import B, case, function, normal


class Sequence(nn.Module):
    """The outputs of a recurrent layer, batch-first outside."""

    def __init__(self, inner: nn.Module, packed: bool = False) -> None:
        super().__init__()
        self.inner, self.packed = inner, packed
        self.scale = nn.Parameter(torch.tensor(0.7)) if packed else 1.0

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.scale  # rows picked straight from the data are refused
        x = x if self.inner.batch_first else x.transpose(0, 1)
        if self.packed:
            lengths = torch.arange(B, 0, -1)
            x = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=self.inner.batch_first)
        y, _ = self.inner(x)
        if self.packed:
            y, _ = nn.utils.rnn.pad_packed_sequence(y, batch_first=self.inner.batch_first)
        return y if self.inner.batch_first else y.transpose(0, 1)


class Cell(nn.Module):
    """A cell run over time."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        state, outputs = None, []
        for x_t in x.unbind(1):
            state = self.inner(x_t, state)
            outputs.append(state[0] if isinstance(state, tuple) else state)
        return torch.stack(outputs, 1)


for layer in (nn.RNN, nn.GRU, nn.LSTM):
    for label, options in {
        "batch first": {"batch_first": True},
        "time first": {},
        "bidirectional": {"batch_first": True, "bidirectional": True},
        "without bias": {"batch_first": True, "bias": False},
        "2 layers with dropout": {"batch_first": True, "num_layers": 2, "dropout": 0.3},
    }.items():
        case(f"{layer.__name__} {label}", lambda c=layer, o=options: Sequence(c(3, 4, **o)), normal(B, 5, 3))
    case(f"{layer.__name__} time first, T equals B", lambda c=layer: Sequence(c(3, 4)), normal(B, B, 3))
    case(f"{layer.__name__} packed", lambda c=layer: Sequence(c(3, 4, batch_first=True), packed=True), normal(B, B, 3))
case("RNN relu", lambda: Sequence(nn.RNN(3, 4, nonlinearity="relu", batch_first=True)), normal(B, 5, 3))
case("LSTM proj_size", lambda: Sequence(nn.LSTM(3, 4, proj_size=2, batch_first=True)), normal(B, 5, 3))
for cell in (nn.RNNCell, nn.GRUCell, nn.LSTMCell):
    case(cell.__name__, lambda c=cell: Cell(c(3, 4)), normal(B, 5, 3))
function(
    "gru_cell, biases by name",
    lambda x, h, i, s, a, b: torch.gru_cell(x, h, i, s, b_ih=a, b_hh=b),
    normal(B, 5),
    normal(B, 4),
    i=(12, 5),
    s=(12, 4),
    a=(12,),
    b=(12,),
)
