"""Public architectures, built from config with small random weights, unmodified, against one example at a time.

A registry file a library holds functions that build one model each and return (model, loss_fn); `measure` runs one in
float64. Dropout, drop path and label drop stay on: dither records one real forward, the reference is plain autograd on
a second plain forward from the same random states, so it sees the masks that were drawn.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dither
import oracle
from dither.errors import DitherError

B = 3
"""Examples in a batch."""

BOUND = 1e-8
"""Largest relative error that counts as exact."""

ROUNDING = 1e-12
"""Errors above it are compared with the oracle's own."""

STRATEGIES = ("auto", "ghost")
Build = Callable[[], tuple[nn.Module, Callable[[], Tensor]]]


@dataclass(frozen=True)
class Entry:
    """An architecture, its inputs and a loss per example.

    Attributes:
        library: where the architecture comes from.
        name: the row's name; the class's, and what sets it apart.
        inputs: what the forward is given, in words.
        build: makes the model and a function that returns per-example losses (B,).
        quick: whether the tests run it (the table runs all).
        refused: the name of the error, or of the kind of error, that is right here, if one is.
        note: what differs from the architecture as it is used, or why the error is as large as it is.
        bound: the error that counts as exact.
        dtype: float32 where the architecture itself does not run in float64.
    """

    library: str
    name: str
    inputs: str
    build: Build
    quick: bool = False
    refused: str | None = None
    note: str = ""
    bound: float = BOUND
    dtype: torch.dtype = torch.float64


@dataclass
class Measured:
    """What `measure` found.

    Attributes:
        parameters: number of trainable parameters.
        uses: parameter uses that were recorded.
        unreached: parameter tensors that no example's loss reaches, out of `tensors`.
        random: whether the forward drew random numbers.
        errors: relative errors: of per-example gradients, and of the clipped sum by strategy.
        own_error: of the oracle against itself with scaled losses; None where our error is at float64's rounding.
        failure: what was raised instead.
    """

    parameters: int = 0
    uses: int = 0
    unreached: int = 0
    tensors: int = 0
    random: bool = False
    errors: dict[str, float] = field(default_factory=dict)
    own_error: float | None = None
    failure: Exception | None = None

    @property
    def error(self) -> float:
        """The largest relative error."""
        return max(self.errors.values())

    @property
    def refusal(self) -> str:
        """The name of dither's error; empty if there is none."""
        return type(self.failure).__name__ if isinstance(self.failure, DitherError) else ""

    def is_refused_as(self, chosen: Entry) -> bool:
        """Whether the error, or a kind that it belongs to, is the one that is right for the entry."""
        return bool(self.refusal) and chosen.refused in [kind.__name__ for kind in type(self.failure).__mro__]


ENTRIES: list[Entry] = []


def entry(library: str, name: str, inputs: str, **options: Any) -> Callable[[Build], Build]:
    """Register an architecture."""

    def register(build: Build) -> Build:
        ENTRIES.append(Entry(library, name, inputs, build, **options))
        return build

    return register


@contextmanager
def fixed(dtype: torch.dtype) -> Iterator[None]:
    """A default dtype, and fixed seeds."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        torch.manual_seed(0)
        random.seed(0)
        numpy.random.seed(0)
        yield
    finally:
        torch.set_default_dtype(before)


class RandomStates:
    """The random states of torch, Python and numpy at one moment."""

    def __init__(self) -> None:
        self._torch, self._python, self._numpy = torch.get_rng_state(), random.getstate(), numpy.random.get_state()

    def restore(self) -> None:
        """Back to that moment."""
        torch.set_rng_state(self._torch)
        random.setstate(self._python)
        numpy.random.set_state(self._numpy)

    def moved(self) -> bool:
        """Whether anything was drawn since, from any of them."""
        same = torch.equal(self._torch, torch.get_rng_state()) and self._python == random.getstate()
        now = numpy.random.get_state()
        return not (same and now[2] == self._numpy[2] and numpy.array_equal(now[1], self._numpy[1]))


def measure(chosen: Entry) -> Measured:
    """Per-example gradients and clipped sums of one architecture against the oracle; what it raises is kept."""
    found = Measured()
    try:
        with fixed(chosen.dtype):
            model, loss_fn = chosen.build()
            model.to(chosen.dtype).train()
            _disturb(model)
            found.parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
            _compare(model, loss_fn, found)
    except Exception as failure:
        found.failure = failure
    return found


def _disturb(model: nn.Module) -> None:
    """Small noise on every parameter: nothing stays at a zero that hides a gradient."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)


def _compare(model: nn.Module, loss_fn: Callable[[], Tensor], found: Measured) -> None:
    states = RandomStates()
    ours = dither.per_example_gradients(model, loss_fn)
    found.random = states.moved()
    states.restore()
    truth = oracle.per_example_gradients(model, loss_fn)
    found.tensors, found.unreached = len(truth), sum(not bool(g.any()) for g in truth.values())
    found.errors["per-example gradients"] = oracle.relative_error(ours, truth)
    bound = float(oracle.norms(truth).median())  # some examples are clipped, some are not
    expected = oracle.clipped_sum(truth, bound)
    for strategy in STRATEGIES:
        states.restore()
        result = dither.clipped_sum(model, loss_fn, max_grad_norm=bound, strategy=strategy)
        found.errors[f"clipped sum, {strategy}"] = oracle.relative_error(result.gradients, expected)
        found.uses = len(result.plan.uses)
    if found.error > ROUNDING:
        states.restore()
        scaled = oracle.per_example_gradients(model, lambda: 3 * loss_fn())
        found.own_error = oracle.relative_error({name: g / 3 for name, g in scaled.items()}, truth)


# --- losses per example, and inputs ----------------------------------------------------------


def denoising(forward: Callable[[], Any]) -> Callable[[], Tensor]:
    """Mean squared error of each example's own outputs against numbers that stay the same."""

    def loss_fn() -> Tensor:
        output = forward()
        outputs = [output] if isinstance(output, Tensor) else [o for o in output if isinstance(o, Tensor)]
        fixed = torch.Generator().manual_seed(7)
        parts = [(o - torch.randn(o.shape, generator=fixed)).square().flatten(1).mean(1) for o in outputs]
        return torch.stack(parts).sum(0)

    return loss_fn


def classification(forward: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Cross-entropy; example i is of class i."""
    return lambda: F.cross_entropy(forward(), torch.arange(B), reduction="none")


def next_token(forward: Callable[[], Tensor], ids: Tensor) -> Callable[[], Tensor]:
    """Cross-entropy of each next token, averaged over an example's own tokens."""

    def loss_fn() -> Tensor:
        logits = forward()
        return F.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none").mean(1)

    return loss_fn


def same_token(forward: Callable[[], Tensor], ids: Tensor) -> Callable[[], Tensor]:
    """Cross-entropy of each token at its own place (masked language models)."""
    return lambda: F.cross_entropy(forward().transpose(1, 2), ids, reduction="none").mean(1)


def images(size: int = 8, channels: int = 3) -> Tensor:
    """(B, channels, size, size)."""
    return torch.randn(B, channels, size, size)


def timesteps() -> Tensor:
    """(B,) integers."""
    return torch.randint(1000, (B,))


def tokens(length: int = 6, vocabulary: int = 37) -> Tensor:
    """(B, length) ids."""
    return torch.randint(3, vocabulary, (B, length))


# --- batch normalisation ----------------------------------------------------------------------

REPLACED = "batch norm replaced by group norm"


def group_norm(channels: int, **_: Any) -> nn.Module:
    """Two groups, or one where the channels are odd; a `norm_layer` to build with."""
    return nn.GroupNorm(2 if channels % 2 == 0 else 1, channels)


def without_batch_norm(model: nn.Module) -> nn.Module:
    """The model with group norm where it had batch norm; an activation that was fused with it stays."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.modules.batchnorm._BatchNorm):
                norm = group_norm(child.num_features)
                fused = [getattr(child, part) for part in ("drop", "act") if hasattr(child, part)]
                setattr(parent, name, nn.Sequential(norm, *fused) if fused else norm)
    return model
