"""Stock Opacus and opake, each used as its own documentation says; imported only when they are asked for.

Sources: Opacus 1.6, `PrivacyEngine.make_private` and the skipped steps of its `BatchMemoryManager`; opake 0.16,
`opake.dpsgd.clipping.clipped_grad` and `opake.dpsgd.noise.gaussian_noise`.
"""

from __future__ import annotations

import secrets
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from dither.benchmark.models import MicroBatch, Workload
from dither.errors import ConfigurationError

_MAX_GRAD_NORM = 1.0
_LEARNING_RATE = 1e-4


class _Criterion:
    """The workload's losses as Opacus wants them: their mean, or one each where its ghost mode asks for that."""

    def __init__(self, workload: Workload) -> None:
        self.workload, self.reduction = workload, "mean"

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        losses = self.workload.losses(output, target)
        return losses if self.reduction == "none" else losses.mean()


class Opacus:
    """`PrivacyEngine.make_private` in one of its modes.

    Micro-batches are steps that its optimizer is told to skip, as its BatchMemoryManager tells it.
    """

    def __init__(self, workload: Workload, microbatches: int, noise_multiplier: float, mode: str) -> None:
        from opacus import PrivacyEngine
        from torch.utils.data import DataLoader, TensorDataset

        if workload.sizes.views != 1:
            raise ConfigurationError("Opacus counts every row as an example", fix="views=1")
        self.batches = workload.batches(microbatches)
        model = workload.build()
        rows = TensorDataset(torch.arange(microbatches * workload.sizes.batch))
        trained = [p for p in model.parameters() if p.requires_grad]
        self.criterion: Any = _Criterion(workload)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of its generator, which is not a secure one, and of the accountant
            made = PrivacyEngine(accountant="rdp").make_private(
                module=model,
                optimizer=torch.optim.AdamW(trained, lr=_LEARNING_RATE, fused=True),
                data_loader=DataLoader(rows, batch_size=len(rows)),  # tells it the size of the logical batch
                criterion=self.criterion,
                noise_multiplier=noise_multiplier,
                max_grad_norm=_MAX_GRAD_NORM,
                poisson_sampling=False,
                grad_sample_mode=mode,
            )
        self.model: nn.Module = made[0]
        self.optimizer: Any = made[1]
        if mode == "ghost":
            self.criterion = made[2]

    def step(self) -> None:
        """All micro-batches; the last takes the step."""
        for batch in self.batches[:-1]:
            self._one(batch, skip=True)
        self._one(self.batches[-1], skip=False)

    def sums(self) -> dict[str, Tensor]:
        """What its optimizer has summed, every micro-batch skipped."""
        for batch in self.batches:
            self._one(batch, skip=True)
        named: dict[str, Any] = dict(self.model.named_parameters())
        named = {n.removeprefix("_module."): p for n, p in named.items() if p.requires_grad}
        found = {n: p.summed_grad.detach().clone() for n, p in named.items() if p.summed_grad is not None}
        for parameter in named.values():
            parameter.summed_grad = None
        return found

    def _one(self, batch: MicroBatch, skip: bool) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch, of backward hooks on inputs without gradient
            self.optimizer.signal_skip_step(do_skip=skip)
            self.optimizer.zero_grad()
            self.criterion(self.model(*batch.inputs), batch.target).backward()
            self.optimizer.step()


class Opake:
    """opake's `clipped_grad`, which runs the model under `vmap`, its noise, and torch's fused AdamW."""

    def __init__(self, workload: Workload, microbatches: int, noise_multiplier: float) -> None:
        from opake.dpsgd.clipping import clipped_grad
        from opake.dpsgd.noise import gaussian_noise
        from opake.random import key

        if workload.sizes.views != 1:
            raise ConfigurationError("opake counts every row as an example", fix="views=1")
        self.model = workload.build()
        self.parameters = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(self.parameters.values(), lr=_LEARNING_RATE, fused=True)
        batches = workload.batches(microbatches)
        columns = zip(*((*batch.inputs, batch.target) for batch in batches), strict=True)
        self.data = tuple(torch.cat(column) for column in columns)

        def loss(parameters: dict[str, Tensor], *example: Tensor) -> Tensor:
            *inputs, target = (part.unsqueeze(0) for part in example)
            output = torch.func.functional_call(self.model, parameters, tuple(inputs))
            return workload.losses(output, target).squeeze(0)

        self.gradient, self.clip_state = clipped_grad(
            loss,
            clipping_norm=_MAX_GRAD_NORM,
            batch_argnums=tuple(range(1, len(self.data) + 1)),
            microbatch_size=workload.sizes.batch,
        )
        self.noise, self.noise_state = gaussian_noise(noise_multiplier=noise_multiplier, key=key(secrets.randbits(31)))
        self.logical_batch = microbatches * workload.sizes.batch

    def _clipped(self) -> Any:
        parameters = {n: p.detach() for n, p in self.parameters.items()}
        clipped, self.clip_state = self.gradient(parameters, *self.data, state=self.clip_state)
        return clipped

    def sums(self) -> dict[str, Tensor]:
        """As `clipped_grad` returns them."""
        return dict(self._clipped().pytree)

    def step(self) -> None:
        """Sum, noise, divide, update."""
        noisy, self.noise_state = self.noise(self._clipped(), self.noise_state)
        for name, parameter in self.parameters.items():
            parameter.grad = noisy.pytree[name].div_(self.logical_batch)
        self.optimizer.step()
