"""Held gradients are written into the memory that is handed out for them, not beside it."""

from __future__ import annotations

import sys
import threading

import pytest
import torch
from torch import nn

import dither
from dither.clipping.buffers import Buffers
from dither.rules import conv

LAYERS = {
    "linear": (nn.Linear(6, 5, bias=False), (3, 4, 6)),
    "conv2d, patches": (nn.Conv2d(2, 4, 3, padding=1, bias=False), (3, 2, 5, 5)),
    "conv2d in groups, patches": (nn.Conv2d(4, 6, 3, groups=2, bias=False), (3, 4, 5, 5)),
    "conv1d, patches": (nn.Conv1d(2, 4, 3, stride=2, bias=False), (3, 2, 9)),
    "conv_transpose2d, patches": (nn.ConvTranspose2d(2, 4, 3, bias=False), (3, 2, 5, 5)),
    "conv2d, a call for each": (nn.Conv2d(2, 4, 3, bias=False), (3, 2, 5, 5)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_the_buffer_is_used(name, monkeypatch):
    layer, shape = LAYERS[name]
    x, handed = torch.randn(shape), []

    def take(self, key, batch, parameter):
        handed.append(torch.full((batch, *parameter.shape), torch.nan))
        return handed[-1]

    monkeypatch.setattr(Buffers, "take", take)
    if name.endswith("each"):
        monkeypatch.setattr(conv, "_WORTH_A_CALL", -1)
    gradients = dither.per_example_gradients(layer, lambda: layer(x).square().flatten(1).sum(1))
    assert len(handed) == 1
    torch.testing.assert_close(handed[0], gradients["weight"], rtol=0, atol=0)


@pytest.mark.parametrize("line", range(12))
def test_two_threads_never_hold_the_same_memory(line):
    """One thread is at each line of `take` in turn while another takes, and keeps, memory for the same key."""
    buffers, parameter, other = Buffers(), torch.zeros(4, 4), []
    buffers.take("weight", 2, parameter)
    lines = 0

    def watch(frame, event, argument):
        nonlocal lines
        if frame.f_code is not Buffers.take.__code__:
            return None
        if event == "line":
            lines += 1
            if lines == line + 1:
                thread = threading.Thread(target=lambda: other.append(buffers.take("weight", 2, parameter)))
                thread.start()
                thread.join()
        return watch

    before = sys.gettrace()
    sys.settrace(watch)
    try:
        mine = buffers.take("weight", 2, parameter)
    finally:
        sys.settrace(before)
    assert all(mine.data_ptr() != theirs.data_ptr() for theirs in other)
