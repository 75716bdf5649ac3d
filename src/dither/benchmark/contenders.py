"""The plain step and dither's, each on a logical batch of several micro-batches.

A contender has its own copy of the model, and fused AdamW. A private step is the clipped sum of every micro-batch,
Gaussian noise once, the division by the batch size, and the optimizer. The other libraries are in `competitors.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dither.benchmark import competitors
from dither.benchmark.models import MicroBatch, Workload
from dither.clipping import clipped_sum
from dither.errors import ConfigurationError
from dither.noise import GaussianNoise

MAX_GRAD_NORM = 1.0
LEARNING_RATE = 1e-4


class Contender(Protocol):
    """One way of training."""

    def step(self) -> None:
        """Take an optimizer step on the logical batch."""
        ...

    def sums(self) -> dict[str, Tensor]:
        """The clipped sum of the logical batch by parameter name, without noise; the weights stay."""
        ...


class Plain:
    """Without privacy: the gradient of the mean loss, accumulated over micro-batches."""

    def __init__(self, workload: Workload, microbatches: int, noise_multiplier: float) -> None:
        self.workload, self.model = workload, workload.build_to_train()
        self.batches = workload.batches(microbatches)
        self.optimizer = torch.optim.AdamW(
            [p for p in self.model.parameters() if p.requires_grad], lr=LEARNING_RATE, fused=True
        )

    def step(self) -> None:
        """Zero, accumulate, update."""
        self.optimizer.zero_grad()
        for batch in self.batches:
            losses = self.workload.losses(self.model(*batch.inputs), batch.target)
            (losses.mean() / len(self.batches)).backward()
        self.optimizer.step()

    def sums(self) -> dict[str, Tensor]:
        """Nothing is clipped here."""
        raise ConfigurationError("the plain step clips nothing", fix="ask a private contender")


class Dither:
    """dither's clipped sums under one strategy."""

    def __init__(self, workload: Workload, microbatches: int, noise_multiplier: float, strategy: str) -> None:
        self.workload, self.model, self.strategy = workload, workload.build_to_train(), strategy
        self.batches = workload.batches(microbatches)
        self.noise, self.noise_multiplier = GaussianNoise(), noise_multiplier
        self.parameters = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(self.parameters.values(), lr=LEARNING_RATE, fused=True)
        self.totals = {n: torch.zeros_like(p, requires_grad=False) for n, p in self.parameters.items()}
        self.logical_batch = microbatches * workload.sizes.batch

    def sums(self) -> dict[str, Tensor]:
        """Of the micro-batches, in memory that the next step uses again."""
        for total in self.totals.values():
            total.zero_()
        for batch in self.batches:

            def losses(batch: MicroBatch = batch) -> Tensor:
                return self.workload.losses(self.model(*batch.inputs), batch.target)

            clipped_sum(self.model, losses, max_grad_norm=MAX_GRAD_NORM, strategy=self.strategy, into=self.totals)
        return self.totals

    def step(self) -> None:
        """Sum, noise, divide, update."""
        sums = self.sums()
        self.noise.add_(sums, self.noise_multiplier * MAX_GRAD_NORM, divisor=self.logical_batch)
        for name, parameter in self.parameters.items():
            parameter.grad = sums[name]
        self.optimizer.step()


@dataclass(frozen=True)
class Registered:
    """A contender by its title in tables, and how it is made."""

    title: str
    make: Callable[[Workload, int, float], Contender]


def _opacus(mode: str) -> Callable[[Workload, int, float], Contender]:
    return lambda workload, microbatches, noise: competitors.Opacus(workload, microbatches, noise, mode)


def _dither(strategy: str) -> Callable[[Workload, int, float], Contender]:
    return lambda workload, microbatches, noise: Dither(workload, microbatches, noise, strategy)


CONTENDERS = {
    "plain": Registered("plain", Plain),
    "auto": Registered("dither auto", _dither("auto")),
    "hold": Registered("dither hold", _dither("hold")),
    "ghost": Registered("dither ghost", _dither("ghost")),
    "tile": Registered("dither tile", _dither("tile")),
    "two_pass": Registered("dither two_pass", _dither("two_pass")),
    "opacus_hooks": Registered("Opacus hooks", _opacus("hooks")),
    "opacus_functorch": Registered("Opacus functorch", _opacus("functorch")),
    "opacus_ghost": Registered("Opacus ghost", _opacus("ghost")),
    "opake": Registered("opake", competitors.Opake),
}
"""By the name that the command knows."""

OURS = ("auto", "hold", "ghost", "tile", "two_pass")


def contender(name: str, workload: Workload, microbatches: int, noise_multiplier: float = 1.0) -> Contender:
    """Make a contender.

    Args:
        name: of CONTENDERS.
        workload: model and data.
        microbatches: in a logical batch.
        noise_multiplier: standard deviation of the noise in units of max_grad_norm.

    Raises:
        ConfigurationError: no such contender.
    """
    if name not in CONTENDERS:
        raise ConfigurationError(f"there is no contender {name!r}", fix=f"choose of {', '.join(CONTENDERS)}")
    return CONTENDERS[name].make(workload, microbatches, noise_multiplier)
