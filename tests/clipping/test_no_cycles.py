"""What a step holds is given back when it ends, without waiting for the garbage collector."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn

import dither


class Watched(nn.Module):
    """Two layers; keeps a weak reference to what is between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        hidden = self.first(x)
        self.between = [weakref.ref(hidden), weakref.ref(hidden.untyped_storage())]
        return self.second(hidden)


@pytest.mark.parametrize("strategy", ["auto", "hold", "ghost", "tile", "two_pass"])
def test_a_step_leaves_no_activation_behind(strategy):
    model, x = Watched(), torch.randn(5, 6, 3)

    def losses():
        return model(x).square().flatten(1).sum(1)

    for _ in range(3):  # the first proves
        gc.collect()
        gc.disable()
        try:
            dither.clipped_sum(model, losses, strategy=strategy)
            assert [reference() for reference in model.between] == [None, None]
        finally:
            gc.enable()
