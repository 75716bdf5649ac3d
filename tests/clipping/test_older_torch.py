"""What stands for functions that older torch lacks gives the same; `make test TORCH=2.6.0` runs all tests on one."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.autograd import graph

import dither
from clipping.test_exactness import assert_exact, loss_of
from dither.capture import saving, tracing


@pytest.mark.usefixtures("double_precision")
def test_a_compiled_block_runs_as_written_where_torch_cannot_count_its_variants(monkeypatch):
    monkeypatch.setattr(tracing, "ISOLATES", False)
    monkeypatch.setattr(tracing, "_tracers", {})
    model = nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.Tanh(), nn.Linear(4, 4), nn.ReLU()), nn.Linear(4, 2))
    dither.compile(model[1], backend="aot_eager")
    x = torch.randn(5, 3)
    with pytest.warns(tracing.AsWrittenWarning, match="Sequential runs as it is written"):
        dither.clipped_sum(model, lambda: loss_of(model(x)))
    assert_exact(model, lambda: loss_of(model(x)))


def test_active_hooks_are_found_without_being_called():
    def never(tensor):
        raise AssertionError

    found = saving._refuse_to_be_disabled
    assert not found()
    with graph.saved_tensors_hooks(never, never):
        assert found() and found()
        with pytest.raises(AssertionError):  # they are active still
            torch.ones(1, requires_grad=True).square()
    assert not found()


def test_hooks_that_are_disabled_stay_so():
    with graph.disable_saved_tensors_hooks("for a reason"):
        assert not saving._refuse_to_be_disabled()
        with pytest.raises(RuntimeError, match="for a reason"), graph.saved_tensors_hooks(id, id):
            torch.ones(1)
    with graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        torch.ones(1, requires_grad=True).square().backward()
