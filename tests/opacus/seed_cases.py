"""DiTs, batches and references for the suites that `seed.md` names.

Reference: autograd on the unwrapped model, one example's loss at a time. `one_at_a_time` gives each example a forward
pass of its own, in float64, where rounding plays no part; `replayed` goes back through one forward pass of the batch in
float32, for the masks that a seed draws for a batch. Errors are relative, at most 1e-6 in float32.

Legend: B examples, C channels, H = W image side.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import oracle
from dither.diffusion import DiTModelWithFlashAttention

TOLERANCE = 1e-6

Gradients = dict[str, Tensor]
Losses = Callable[..., Tensor]
"""Of a model and a batch's tensors: one loss per example, (B,)."""

SMALL = {
    "img_size": 16, "patch_size": 4, "hidden_size": 24, "depth": 2, "num_heads": 2, "num_classes": 7,
    "class_dropout_prob": 0.0,
}  # fmt: skip
"""A DiT of 16 tokens that takes a hundredth of a second."""


def dit(**config) -> DiTModelWithFlashAttention:
    """A DiT in which every parameter has a gradient: moved off its start, where the blocks are the identity."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = DiTModelWithFlashAttention(**{**SMALL, **config})
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return model


def dit_batch(size: int, seed: int = 1, **config) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images (B, C, H, W), timesteps (B,), labels (B,) and targets (B, C, H, W)."""
    side = {**SMALL, **config}["img_size"]
    generator = torch.Generator().manual_seed(seed)
    images, target = torch.randn(2, size, 3, side, side, generator=generator)
    return (
        images,
        torch.randint(1000, (size,), generator=generator),
        torch.randint(SMALL["num_classes"], (size,), generator=generator),
        target,
    )


def per_example_mse(output: Tensor, target: Tensor) -> Tensor:
    """(B, ...) to (B,)."""
    return F.mse_loss(output, target, reduction="none").flatten(1).mean(1)


def dit_losses(model: nn.Module, images: Tensor, timesteps: Tensor, labels: Tensor, target: Tensor) -> Tensor:
    """The document's loss, (B,)."""
    return per_example_mse(model(images, timesteps, labels), target)


def one_at_a_time(model: nn.Module, losses: Losses, *batch: Tensor) -> Gradients:
    """Per-example gradients, (B, *shape), each from a forward pass of that example alone, in float64."""
    model = _unwrapped(model).double()
    batch = tuple(t.double() if t.is_floating_point() else t for t in batch)
    alone = [[t[i : i + 1] for t in batch] for i in range(len(batch[0]))]
    return oracle.per_example_gradients(model, lambda: torch.cat([losses(model, *example) for example in alone]))


def replayed(model: nn.Module, losses: Losses, *batch: Tensor, state: Tensor) -> Gradients:
    """Per-example gradients, (B, *shape), through one forward pass of the batch, in float32.

    The random generator starts from `state` (`torch.get_rng_state()`).
    """
    model = _unwrapped(model)
    torch.set_rng_state(state)
    return oracle.per_example_gradients(model, lambda: losses(model, *batch))


def seeded(seed: int) -> Tensor:
    """Seed the random generator; its state."""
    torch.manual_seed(seed)
    return torch.get_rng_state()


def _unwrapped(model: nn.Module) -> nn.Module:
    assert not hasattr(model, "autograd_grad_sample_hooks"), "the reference is of the model as it was before wrapping"
    return copy.deepcopy(model)


def clipped_sum(gradients: Gradients, max_grad_norm: float) -> Gradients:
    """Sum over examples of gradients times Opacus's factor, min(1, C / (norm + 1e-6))."""
    factors = (max_grad_norm / (oracle.norms(gradients) + 1e-6)).clamp(max=1.0)
    return {name: torch.einsum("b,b...->...", factors, g.double()) for name, g in gradients.items()}


def median_norm(gradients: Gradients) -> float:
    """A bound that clips half of the examples."""
    return float(oracle.norms(gradients).median())


def named(wrapped: nn.Module, attribute: str) -> Gradients:
    """An attribute of every trainable parameter, by the parameter's name in the unwrapped model."""
    inner = wrapped._module.named_parameters()
    return {name: getattr(p, attribute).detach().clone() for name, p in inner if p.requires_grad}


def example_error(ours: Gradients, truth: Gradients) -> float:
    """The worst example's relative error over all parameters."""
    size = len(next(iter(truth.values())))
    for name, gradients in truth.items():
        assert ours[name].shape == gradients.shape, name
    assert all(float(norm) > 0 for norm in oracle.norms(truth).detach()), "an example without a gradient proves nothing"
    rows = [({n: g[i] for n, g in ours.items()}, {n: g[i] for n, g in truth.items()}) for i in range(size)]
    return max(oracle.relative_error(mine, true) for mine, true in rows)


def parameter_error(ours: Gradients, truth: Gradients) -> float:
    """The worst parameter's relative error."""
    assert ours.keys() == truth.keys()
    return max(oracle.relative_error({name: ours[name]}, {name: truth[name]}) for name in truth)


def within(what: str, error: float) -> None:
    """Print a relative error and hold it to 1e-6."""
    print(f"{what}: relative error {error:.1e}")
    assert error <= TOLERANCE, f"{what}: relative error {error:.2e} is above {TOLERANCE}"
