"""Sequences of calls around a step that could let a gradient through unclipped, or lose one without a word."""

from __future__ import annotations

import contextlib
import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from limits import squares
from limits_measure import DITHER, EXACT, MODES, C, clipped_sum
from torch import Tensor, nn
from torch.nn import functional as F

import dither
from dither.errors import CoupledExamplesError, DitherError
from oracle import per_example_gradients, relative_error

each_mode = pytest.mark.parametrize("mode", MODES)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def batch() -> Tensor:
    torch.manual_seed(3)
    return 3 * torch.randn(4, 5, dtype=torch.float64)


class Private:
    """A wrapped network and its optimizer, noise 0, learning rate 0."""

    def __init__(self, mode: str, wrapped: Any = None, **options: Any) -> None:
        self.mode = mode
        if wrapped is None:
            hooks = mode == "hooks"
            wrap = DITHER.GradSampleModule if hooks else DITHER.GradSampleModuleFastGradientClipping
            wrapped = wrap(network(), **({} if hooks else {"max_grad_norm": C}), **options)
        self.wrapped, self.model = wrapped, wrapped._module
        kind = DITHER.DPOptimizer if mode == "hooks" else DITHER.DPOptimizerFastGradientClipping
        sgd = torch.optim.SGD(self.model.parameters(), lr=0.0)
        self.optimizer = kind(sgd, noise_multiplier=0.0, max_grad_norm=C, expected_batch_size=4)

    def backward(self, losses: Any = lambda model, x: squares(model(x)), x: Tensor | None = None) -> None:
        x = batch() if x is None else x
        if self.mode == "hooks":
            losses(self.wrapped, x).mean().backward()
        else:
            criterion = DITHER.DPLossFastGradientClipping(self.wrapped, self.optimizer, lambda *a: losses(*a))
            criterion(self.wrapped, x).backward()

    def error(self, x: Tensor | None = None) -> float:
        """Step; how far the clipped sum is from the oracle's."""
        x, model = batch() if x is None else x, network()
        self.optimizer.step()
        found = {name: p.summed_grad for name, p in self.model.named_parameters()}
        return relative_error(found, clipped_sum(per_example_gradients(model, lambda: squares(model(x)))))


def exact_or_refused(private: Private, x: Tensor | None = None) -> None:
    """The step takes the clipped sum and nothing else, or raises a named error."""
    with contextlib.suppress(DitherError):
        assert private.error(x) <= EXACT


@each_mode
def test_eval_mode_backward_before_the_step(mode: str) -> None:
    private = Private(mode)
    private.backward()
    private.wrapped.eval()
    squares(private.wrapped(batch())).sum().backward()
    exact_or_refused(private)


@each_mode
def test_functional_backward_before_the_step(mode: str) -> None:
    private = Private(mode)
    private.backward()
    F.linear(batch(), private.model[0].weight).sum().backward()
    exact_or_refused(private)


@each_mode
def test_gradient_written_by_hand_before_the_step(mode: str) -> None:
    private = Private(mode)
    private.backward()
    for parameter in private.model.parameters():
        parameter.grad.add_(1000)
    exact_or_refused(private)


@each_mode
def test_plain_backward_instead_of_the_loss_object(mode: str) -> None:
    private = Private(mode)
    squares(private.wrapped(batch())).mean().backward()
    exact_or_refused(private)


class Centred(torch.autograd.Function):
    """The gradient, or what is left of it without its mean over the batch."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, centred: bool) -> Tensor:
        ctx.centred = centred
        return h.view_as(h)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0] - gradients[0].mean(0) if ctx.centred else gradients[0], None


@each_mode
def test_a_custom_function_that_mixes_examples_on_a_later_step_is_refused(mode: str) -> None:
    private = Private(mode)
    for _ in range(2):
        private.backward(lambda model, x: squares(Centred.apply(model(x), False)))
        private.optimizer.step()
        private.optimizer.zero_grad()
    with pytest.raises(CoupledExamplesError):
        private.backward(lambda model, x: squares(Centred.apply(model(x), True)))


def test_two_pass_with_losses_in_another_order_from_the_second_step_on() -> None:
    private, x = Private("ghost", strategy="two_pass"), batch() * torch.tensor([[0.01], [1], [1], [9]])
    private.backward(x=x)
    private.optimizer.step()
    private.optimizer.zero_grad()
    with contextlib.suppress(DitherError):
        private.backward(lambda model, x: squares(model(x))[torch.tensor([3, 0, 2, 1])], x)
        assert private.error(x) <= EXACT


def test_copy_goes_on_after_the_original_is_unhooked(run) -> None:
    run("""
for mode in MODES:
    original = Private(mode)
    private = Private(mode, copy.deepcopy(original.wrapped))
    original.wrapped.remove_hooks()
    private.backward()
    assert private.error() <= EXACT, mode
""")


def test_saved_wrapped_model_goes_on_in_another_process(run, tmp_path: Path) -> None:
    for mode in MODES:
        torch.save(Private(mode).wrapped, tmp_path / f"{mode}.pt")
    run(f"""
for mode in MODES:
    private = Private(mode, torch.load({str(tmp_path)!r} + f"/{{mode}}.pt", weights_only=False))
    private.backward()
    assert private.error() <= EXACT, mode
""")


def test_failed_compilation_leaves_no_recorder_behind(run) -> None:
    run("""
compiled = torch.compile(Private("hooks").wrapped, backend="eager")
try:
    compiled(batch())
except Exception:
    pass
private = Private("hooks")
private.backward()
assert private.error() <= EXACT
""")


@pytest.fixture
def run(programs):
    """Run code in a process of its own, where no other wrapped model is alive."""

    def run(script: str) -> None:
        names = "import copy, torch\nfrom test_adversarial_steps import EXACT, MODES, Private, batch"
        done = programs.run("-c", f"import sys\nsys.path[:0] = {sys.path!r}\n{names}\n{script}")
        assert done.returncode == 0, done.stderr.strip().splitlines()[-1]

    return run


@each_mode
def test_deep_copy(mode: str) -> None:
    original = Private(mode)
    original.wrapped(batch())
    private = Private(mode, copy.deepcopy(original.wrapped))
    private.backward()
    assert private.error() <= EXACT


@each_mode
def test_state_dict_of_the_wrapped_model(mode: str) -> None:
    private = Private(mode)
    private.wrapped.load_state_dict(copy.deepcopy(private.wrapped.state_dict()))
    private.backward()
    assert private.error() <= EXACT


@each_mode
def test_refused_loss_then_a_good_one(mode: str) -> None:
    private = Private(mode)

    def coupled(model: nn.Module, x: Tensor) -> Tensor:
        output = model(x)
        return squares(output - output.mean(0))

    with pytest.raises(DitherError):
        private.backward(coupled)
    private.backward()
    assert private.error() <= EXACT


@each_mode
def test_error_caught_inside_the_forward(mode: str) -> None:
    private = Private(mode)
    with pytest.raises(RuntimeError):
        private.wrapped(torch.randn(4, 9, dtype=torch.float64))
    private.backward()
    assert private.error() <= EXACT


@each_mode
def test_input_gradient_taken_first(mode: str) -> None:
    def losses(model: nn.Module, x: Tensor) -> Tensor:
        found = squares(model(x))
        torch.autograd.grad(found.sum(), x, retain_graph=True)
        return found

    private = Private(mode)
    private.backward(losses, batch().requires_grad_())
    assert private.error() <= EXACT


@each_mode
def test_gradient_penalty(mode: str) -> None:
    def losses(model: nn.Module, x: Tensor) -> Tensor:
        found = squares(model(x))
        (gradient,) = torch.autograd.grad(found.sum(), x, create_graph=True)
        return found + gradient.square().sum(1)

    with pytest.raises(DitherError):
        Private(mode).backward(losses, batch().requires_grad_())


@each_mode
def test_input_changed_in_place_after_the_forward(mode: str) -> None:
    def losses(model: nn.Module, x: Tensor) -> Tensor:
        output = model(x)
        x.zero_()
        return squares(output)

    with pytest.raises(DitherError):
        Private(mode).backward(losses)


@each_mode
def test_output_changed_in_place(mode: str) -> None:
    private = Private(mode)
    private.backward(lambda model, x: squares(model(x).mul_(2) / 2))
    assert private.error() <= EXACT


@each_mode
def test_vector_backward(mode: str) -> None:
    private = Private(mode)
    if mode == "hooks":
        losses = squares(private.wrapped(batch()))
        losses.backward(gradient=torch.full_like(losses, 1 / len(losses)))
    else:
        private.backward()
    assert private.error() <= EXACT


@each_mode
def test_clip_grad_norm_before_the_step(mode: str) -> None:
    private = Private(mode)
    private.backward()
    torch.nn.utils.clip_grad_norm_(private.model.parameters(), 1e9)
    assert private.error() <= EXACT


@each_mode
def test_wrapped_inside_wrapped(mode: str) -> None:
    inner = Private(mode)
    wrap = DITHER.GradSampleModule if mode == "hooks" else DITHER.GradSampleModuleFastGradientClipping
    outer = wrap(nn.Sequential(nn.Linear(5, 5).double()))
    outer._module.append(inner.wrapped)
    with pytest.raises(DitherError):
        squares(outer(batch())).mean().backward()
    # And nothing is left behind: recordings go on as before.
    model = network()
    assert dither.per_example_norms(model, lambda: squares(model(batch()))).shape == (4,)
