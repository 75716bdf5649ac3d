"""Parameters in half precision: what waits for the noise is float32; `.grad` then has the parameter's dtype."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from dither.errors import UnsupportedOpError
from dither.opacus import (
    AdaClipDPOptimizer,
    DistributedDPOptimizer,
    DPLossFastGradientClipping,
    DPOptimizer,
    DPOptimizerFastGradientClipping,
    GradSampleModule,
    GradSampleModuleFastGradientClipping,
)
from dither.opacus.optimizers import DPPerLayerOptimizer

HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
PARTS = {torch.bfloat16: [256] + [1] * 20, torch.float16: [2048] + [1] * 20}
"""From there on the dtype has even numbers only: what is added one at a time would be lost."""


def one(dtype):
    """A model of one weight, each example of which has gradient 10."""
    return nn.Linear(1, 1, bias=False).to(dtype)


def losses_of(output):
    return output.float().sum(1) * 10


def numbers(count, dtype):
    return torch.ones(count, 1, dtype=dtype)


def options(**others):
    return {"noise_multiplier": 0.0, "max_grad_norm": 1.0, "expected_batch_size": 1, "loss_reduction": "sum"} | others


def parts(dtype):
    """Each micro-batch's size, and whether it is the last."""
    return [(part, number == len(PARTS[dtype])) for number, part in enumerate(PARTS[dtype], 1)]


def check(optimizer, parameter, expected):
    """The sum, and the gradient that it became."""
    assert parameter.summed_grad.dtype == torch.float32 and parameter.grad.dtype == parameter.dtype
    # Float32 rounds each of the additions by 2^-24 at most, and equal terms all to the same side.
    assert float(parameter.summed_grad) == pytest.approx(expected, rel=sum(PARTS[parameter.dtype]) * 2**-24)
    assert float(parameter.grad) == pytest.approx(expected, rel=2**-8)
    optimizer.zero_grad()


def adaptive(optimizer, **others):
    settings = {"target_unclipped_quantile": 0.5, "clipbound_learning_rate": 0.1, "max_clipbound": 9.0}
    return AdaClipDPOptimizer(optimizer, min_clipbound=0.1, unclipped_num_std=1.0, **settings, **others)


def per_layer(optimizer, **others):
    return DPPerLayerOptimizer(optimizer, **others | {"max_grad_norm": [1.0]})


@HALF
@pytest.mark.parametrize("kind", [DPOptimizer, adaptive, per_layer])
def test_micro_batches_add_up(kind, dtype):
    module = GradSampleModule(one(dtype), loss_reduction="sum")
    parameter = next(module.parameters())
    optimizer = kind(torch.optim.SGD([parameter], lr=0.0), **options())
    for _ in range(2):
        bound = float(optimizer.max_grad_norm)
        for part, last in parts(dtype):
            optimizer.signal_skip_step(do_skip=not last)
            losses_of(module(numbers(part, dtype))).sum().backward()
            optimizer.step()
            if not last:
                optimizer.zero_grad()
        check(optimizer, parameter, bound * sum(PARTS[dtype]))


@HALF
def test_one_example_of_a_large_batch(dtype):
    sums = []
    for count in (2049, 2048):
        module = GradSampleModule(one(dtype), loss_reduction="sum")
        parameter = next(module.parameters())
        optimizer = DPOptimizer(torch.optim.SGD([parameter], lr=0.0), **options())
        losses_of(module(numbers(count, dtype))).sum().backward()
        optimizer.step()
        sums.append(float(parameter.summed_grad))
    assert sums[0] - sums[1] == pytest.approx(1.0, abs=1e-3)


def flash(dtype):
    module = GradSampleModuleFastGradientClipping(one(dtype), loss_reduction="sum", max_grad_norm=1.0)
    module.allow_grad_accumulation()
    parameter = next(module.parameters())
    optimizer = DPOptimizerFastGradientClipping(torch.optim.SGD([parameter], lr=0.0), **options())
    criterion = DPLossFastGradientClipping(module, optimizer, lambda output, _: losses_of(output), "sum")
    return module, parameter, optimizer, criterion


@HALF
@pytest.mark.parametrize("skips", [False, True])
def test_flash_clipping_adds_up(skips, dtype):
    module, parameter, optimizer, criterion = flash(dtype)
    for _ in range(2):
        for part, _ in parts(dtype):
            criterion(module(numbers(part, dtype)), numbers(part, dtype)).backward()
            if skips:
                optimizer.signal_skip_step(do_skip=True)
                optimizer.step()
                optimizer.zero_grad()
        criterion(module(numbers(1, dtype)), numbers(1, dtype)).backward()
        optimizer.step()
        check(optimizer, parameter, sum(PARTS[dtype]) + 1)


@HALF
def test_sums_that_the_user_scales_are_scaled(dtype):
    module, parameter, optimizer, criterion = flash(dtype)
    for part, _ in parts(dtype):
        criterion(module(numbers(part, dtype)), numbers(part, dtype)).backward()
    parameter.grad.mul_(0.5)
    optimizer.step()
    check(optimizer, parameter, sum(PARTS[dtype]) * 0.5)


@HALF
def test_gradients_weighted_by_hand_add_up(dtype):
    module, parameter, optimizer, _ = flash(dtype)
    for part, last in parts(dtype):
        losses = losses_of(module(numbers(part, dtype)))
        losses.sum().backward(retain_graph=True)
        optimizer.zero_grad()
        module.disable_hooks()
        (losses * module.get_clipping_coef()).sum().backward()
        module.enable_hooks()
        optimizer.signal_skip_step(do_skip=not last)
        optimizer.step()
        if not last:
            optimizer.zero_grad()
    check(optimizer, parameter, sum(PARTS[dtype]))


@HALF
def test_norms_are_float32(dtype):
    module, _, optimizer, _ = flash(dtype)
    module(numbers(2, dtype)).float().sum(1).mul(10.003).sum().backward()
    assert module.get_norm_sample().dtype == torch.float32
    optimizer.zero_grad()


@HALF
def test_a_registered_sampler_s_sum_is_refused(dtype):
    class Own(nn.Linear):
        pass

    from opacus.grad_sample import register_grad_sampler

    @register_grad_sampler(Own)
    def sampler(layer, activations, backprops):
        return {layer.weight: torch.einsum("n...i,n...j->nij", backprops, activations[0])}

    try:
        model = nn.Sequential(Own(1, 1, bias=False), nn.Linear(1, 1, bias=False)).to(dtype)
        module = GradSampleModuleFastGradientClipping(
            model, loss_reduction="sum", max_grad_norm=1.0, use_ghost_clipping=False
        )
        optimizer = DPOptimizerFastGradientClipping(torch.optim.SGD(module.parameters(), lr=0.0), **options())
        criterion = DPLossFastGradientClipping(module, optimizer, lambda output, _: losses_of(output), "sum")
        with pytest.raises(UnsupportedOpError, match="registered"):
            criterion(module(numbers(2, dtype)), numbers(2, dtype)).backward()
    finally:
        del GradSampleModule.GRAD_SAMPLERS[Own]


def worker(rank, address, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    module = GradSampleModule(one(torch.bfloat16), loss_reduction="sum")
    parameter = next(module.parameters())
    optimizer = DistributedDPOptimizer(torch.optim.SGD([parameter], lr=0.0), **options())
    # In bfloat16, a little less than 257 and 259 are 256 and 258, and their sum 512.
    losses_of(module(numbers((257, 259)[rank], torch.bfloat16))).sum().backward()
    optimizer.step()
    results[rank] = (float(parameter.grad), str(parameter.grad.dtype))
    dist.destroy_process_group()


def test_ranks_are_added_before_they_are_rounded(tmp_path):
    with mp.Manager() as manager:
        results = manager.dict()
        mp.start_processes(worker, (f"file://{tmp_path / 'store'}", results), nprocs=2, start_method="forkserver")
        assert [results[rank] for rank in (0, 1)] == [(516.0, "torch.bfloat16")] * 2
