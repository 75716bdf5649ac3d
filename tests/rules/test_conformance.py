"""Every rule in every strategy against one example at a time, in float64 and float32."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import dither
import oracle
from cases import CASES
from dither.rules import conv

BOUND = {torch.float64: 1e-10, torch.float32: 1e-5}


@pytest.fixture(params=[torch.float64, torch.float32], ids=["float64", "float32"])
def dtype(request):
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(before)


def losses(model, inputs, targets: list[Tensor]):
    torch.manual_seed(3)  # the same dropout masks each time
    output = model(*inputs).flatten(1)
    if not targets:
        targets.append(torch.randn_like(output))
    return (output * targets[0]).sum(1) + output.square().sum(1)


@pytest.mark.parametrize("name", CASES)
def test_rule(name, dtype):
    torch.manual_seed(0)
    model, inputs = CASES[name]()
    targets: list[Tensor] = []
    truth = oracle.per_example_gradients(model, lambda: losses(model, inputs, targets))

    def loss_fn() -> Tensor:
        return losses(model, inputs, targets)

    assert oracle.relative_error(dither.per_example_gradients(model, loss_fn), truth) <= BOUND[dtype]
    norms = oracle.norms(truth)
    torch.testing.assert_close(dither.per_example_norms(model, loss_fn).double(), norms, rtol=BOUND[dtype], atol=0)
    bound = float(norms.median())  # some examples are clipped, some are not
    expected = oracle.clipped_sum(truth, bound)
    for strategy in ("auto", "hold", "ghost", "tile", "two_pass"):
        result = dither.clipped_sum(model, loss_fn, max_grad_norm=bound, strategy=strategy)
        assert oracle.relative_error(result.gradients, expected) <= BOUND[dtype], strategy
        torch.testing.assert_close(result.norms.double(), norms, rtol=BOUND[dtype], atol=0, msg=strategy)
        assert result.sensitivity == bound


def _writes_running_statistics_back():
    """Of torch 2.6: an evaluated layer's are written as they were, so that recomputing it is refused."""
    layer = nn.InstanceNorm1d(1, track_running_stats=True).eval()
    layer(torch.ones(2, 1, 3))
    return layer.running_mean._version > 0


REFUSED = {"instance norm with running statistics in eval"} if _writes_running_statistics_back() else set()


@pytest.mark.usefixtures("double_precision")
@pytest.mark.parametrize("name", sorted({*CASES} - {"glu after linear"} - REFUSED))  # torch's RReLU is wrong in one
def test_a_rule_whose_inputs_a_checkpoint_holds(name):
    torch.manual_seed(0)
    model, inputs = CASES[name]()
    targets: list[Tensor] = []
    truth = oracle.per_example_gradients(model, lambda: losses(model, inputs, targets))

    def in_a_checkpoint(*given):
        return checkpoint(model, *given, use_reentrant=False)

    for strategy in ("auto", "two_pass"):
        result = dither.clipped_sum(
            model, lambda: losses(in_a_checkpoint, inputs, targets), max_grad_norm=0.5, strategy=strategy
        )
        assert oracle.relative_error(result.gradients, oracle.clipped_sum(truth, 0.5)) <= 1e-10, strategy


CONVOLUTIONS = [name for name in CASES if name.startswith("conv")]


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_one_example_at_a_time_inside_the_rule(name, dtype, monkeypatch):
    """As large convolutions are taken: torch's own weight gradient of each example's maps."""
    monkeypatch.setattr(conv, "_WORTH_GROUPS", -1)
    monkeypatch.setattr(conv, "_WORTH_A_CALL", -1)
    test_rule(name, dtype)


@pytest.mark.parametrize("dtype", [torch.float32], ids=["float32"], indirect=True)  # float64 has no groups
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_by_groups_of_some_examples(name, dtype, monkeypatch):
    monkeypatch.setattr(conv, "_WORTH_GROUPS", 1 << 30)
    monkeypatch.setattr(conv, "_AT_ONCE", 3000)
    test_rule(name, dtype)


def test_small_convolutions_take_examples_as_groups(monkeypatch):
    if not torch.backends.mkldnn.is_available():
        pytest.skip("without oneDNN they would be slow")
    asked = []
    before = conv.ConvWeight._weight_gradient

    def watched(self, use, wide, narrow, times=1):
        asked.append(times)
        return before(self, use, wide, narrow, times)

    monkeypatch.setattr(conv.ConvWeight, "_weight_gradient", watched)
    model, x = torch.nn.Conv2d(4, 8, 3), torch.randn(5, 4, 9, 9)
    dither.per_example_gradients(model, lambda: model(x).square().flatten(1).sum(1))
    assert set(asked) == {5}
