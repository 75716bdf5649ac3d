"""Private training: the loop's state machine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dither import checkpoint
from dither.accounting import (
    GRADIENTS,
    EpsilonCurve,
    Event,
    Ledger,
    noise_multiplier_for,
)
from dither.accounting.events import check_delta, check_mechanism
from dither.capture.declared import follow
from dither.certificate import certificate
from dither.clipping.clipped_sum import clipped_sum, zero_sums
from dither.clipping.functions import clipping_function
from dither.clipping.machine import builtin_rates
from dither.clipping.plan import check_strategy
from dither.errors import ConfigurationError, DivergedError, LedgerError, LossShapeError, MemoryBudgetError
from dither.first_batches import COMPARED, FirstBatches
from dither.microbatches import MicrobatchSize
from dither.noise import GaussianNoise, check_seed, torch_seed
from dither.parameters import trained_parameters
from dither.sampling import CollateFunction, PoissonSampler, check_dataset, load_batch
from dither.tally import Step as Step
from dither.tally import Tally

LossFunction = Callable[[nn.Module, Any], Tensor]
_DEFAULT_EPSILON = 8.0


class PrivateTraining:
    """DP-SGD with any torch optimizer (Abadi et al. 2016, algorithm 1) on Poisson batches.

    Iterating trains: `for step in training` yields a `Step` after each completed one. Leaving the loop is safe, and
    iterating again continues. Each step draws a Poisson batch, sums its clipped gradients over micro-batches, adds
    Gaussian noise once, divides by the public constant `expected_batch_size`, and lets the optimizer step. Sums and
    noise are float32 or wider; what the optimizer gets has the parameter's dtype. An empty batch takes a noisy step
    like any other.

    Guarantee: the weights, the EMA and the optimizer's state after any number of steps are (epsilon, delta)-
    differentially private under adding or removing one example of the dataset, with `epsilon(delta)` as it then says;
    the steps and noise are planned so that the whole run spends at most `epsilon`. What `Step` marks as not private is
    outside the guarantee. So is a run with a seed.

    The number of examples is taken as public: it sets the sample rate.

    Args:
        model: any module; every parameter with requires_grad is trained. It is not wrapped or changed.
        optimizer: any torch optimizer over parameters of the model. Where torch has one, `fused=True` makes AdamW's
            step several times faster. One with `noise_std` in its groups (`AdamBC`) is told the noise's deviation.
        dataset: map-style; the example is the unit of privacy, so one person's several examples are not protected
            together.
        loss_fn: (model, batch) to one loss per example, shape (b,); example i's loss may depend on example i alone.
        expected_batch_size: mean size of a Poisson batch, and the divisor.
        steps: optimizer steps in the whole run.
        max_grad_norm: bound on each example's gradient norm.
        delta: in (0, 1); below 1 / dataset size.
        epsilon: budget of the whole run; 8 if neither it nor noise_multiplier is given.
        noise_multiplier: noise standard deviation in units of the sensitivity, instead of epsilon.
        microbatch_size: examples computed at once, or "auto" by memory and time; performance only.
        clipping: "flat".
        collate_fn: list of examples to batch; torch's default_collate if None.
        seed: makes batches, noise and torch's randomness a function of (seed, step): for tests; not private.
        strategy: "auto", "hold", "ghost", "tile" or "two_pass"; performance only.
        memory_budget: as `clipped_sum`; performance only. An "auto" microbatch_size keeps to it.
        rows_per_example: as `clipped_sum`.
        ema_decay: keeps an exponential moving average of the parameters, with decay min(ema_decay, (1+t)/(10+t)).
        scheduler: a learning-rate scheduler, stepped once per step.
        verify_first_batch: compare up to 4 examples of the first batch with plain autograd before training; again after
            a resume, and on up to two more batches while some parameters have a zero gradient (gates that start
            closed). The certificate says what came of it.
        prior: what was released from the same examples before, as `ClassMeans.events`: the ledger begins with it, and
            epsilon is that of all together.

    Raises:
        EmptyDatasetError: the dataset has no examples.
        BatchSizeError: expected_batch_size does not fit the dataset.
        BudgetError: no noise meets epsilon, or `prior` has spent it.
        ConfigurationError: another argument cannot work.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        dataset: Any,
        loss_fn: LossFunction,
        *,
        expected_batch_size: float = 256,
        steps: int = 1000,
        max_grad_norm: float = 1.0,
        delta: float = 1e-5,
        epsilon: float | None = None,
        noise_multiplier: float | None = None,
        microbatch_size: int | str = "auto",
        clipping: str = "flat",
        collate_fn: CollateFunction | None = None,
        seed: int | None = None,
        strategy: str = "auto",
        memory_budget: float | None = None,
        rows_per_example: int | None = None,
        ema_decay: float | None = None,
        scheduler: Any = None,
        verify_first_batch: bool = True,
        prior: Iterable[Event] = (),
    ) -> None:
        if epsilon is not None and noise_multiplier is not None:
            raise ConfigurationError(
                f"Both epsilon={epsilon} and noise_multiplier={noise_multiplier} are given.",
                fix="give one; the other follows from it",
            )
        if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            raise ConfigurationError(
                "ReduceLROnPlateau follows the loss, which is not private.", fix="a schedule of the step's number alone"
            )
        check_seed(seed)
        size = check_dataset(dataset)
        self.parameters = trained_parameters(model, optimizer)
        self.sampler = PoissonSampler(size, expected_batch_size, seed=seed)
        check_delta(delta)
        check_mechanism(self.sampler.sample_rate, 1.0 if noise_multiplier is None else noise_multiplier, steps)
        self.sensitivity = clipping_function(clipping, max_grad_norm).sensitivity
        check_strategy(strategy)
        if ema_decay is not None and not 0.0 <= ema_decay < 1.0:
            raise ConfigurationError(f"ema_decay must be at least 0 and below 1; it is {ema_decay}.", fix="0.999")
        self._device = next(iter(self.parameters.values())).device
        self.microbatches = MicrobatchSize(microbatch_size, self._device, seeded=seed is not None)
        self.prior = Ledger(prior).events
        if any(event.release == GRADIENTS for event in self.prior):
            raise ConfigurationError(
                "prior holds gradient steps, which would count as this run's.", fix="resume that run instead"
            )
        if noise_multiplier is None:
            epsilon = _DEFAULT_EPSILON if epsilon is None else epsilon
            noise_multiplier = noise_multiplier_for(epsilon, delta, self.sampler.sample_rate, steps, self.prior)
        self.noise_multiplier, self.delta, self.steps = float(noise_multiplier), float(delta), steps
        self.target_epsilon = None if epsilon is None else float(epsilon)
        self.model, self.optimizer, self.scheduler = model, optimizer, scheduler
        self._dataset, self._loss_fn, self._collate_fn = dataset, loss_fn, collate_fn
        self.max_grad_norm, self.clipping, self.seed = float(max_grad_norm), clipping, seed
        self.ema_decay = None if ema_decay is None else float(ema_decay)
        self._engine: dict[str, Any] = {
            "strategy": strategy,
            "memory_budget": memory_budget,
            "rows_per_example": rows_per_example,
        }
        self._microbatch_size = microbatch_size
        self.first_batches = FirstBatches(verify_first_batch, self._device)
        self.ledger = Ledger(self.prior)
        self.resumed = 0
        self.ema: dict[str, Tensor] | None = None
        if ema_decay is not None:
            self.ema = {name: p.detach().clone() for name, p in self.parameters.items()}
        self._noise = GaussianNoise(seed)
        self._curve = EpsilonCurve(Event(self.sampler.sample_rate, self.noise_multiplier, steps), delta, self.prior)
        self._sums: dict[str, Tensor] | None = None
        for group in optimizer.param_groups:
            if "noise_std" in group:  # an optimizer that reckons with the noise, as `dither.adam.AdamBC`
                group["noise_std"] = self.noise_multiplier * self.sensitivity / self.sampler.expected_batch_size

    @property
    def index(self) -> int:
        """Number of completed steps: the gradient steps that the ledger holds."""
        return self.ledger.steps

    @property
    def verification(self) -> dict[str, Any]:
        """What came of comparing gradients with plain autograd's, the last time it ran, also before a resume."""
        return self.first_batches.found

    @property
    def planned_epsilon(self) -> float:
        """Epsilon of the whole run at its delta."""
        return self._curve.planned

    def epsilon(self, delta: float | None = None) -> float:
        """Epsilon spent so far, exactly accounted.

        Args:
            delta: the run's own if None.

        Raises:
            ConfigurationError: delta is not in (0, 1).
        """
        return self.ledger.epsilon(self.delta if delta is None else delta)

    def __iter__(self) -> Iterator[Step]:
        """Take the remaining steps, one at a time."""
        while self.index < self.steps:
            yield self.step()

    def __len__(self) -> int:
        """Number of steps of the whole run."""
        return self.steps

    def step(self) -> Step:
        """Take one step.

        Raises:
            LedgerError: the planned steps are done.
            CaptureError: the gradients could not be proved exact; nothing was released.
            DivergedError: the weights are not finite any more. The step counts; the optimizer had its noisy sum.
        """
        index = self.index
        if index >= self.steps:
            raise LedgerError(
                f"All {self.steps} planned steps are done; another would spend more than the planned epsilon.",
                fix="plan more steps in a new run: the noise depends on their number",
            )
        indices = self.sampler.draw(index)
        with self._randomness(index):
            tally = self._sum_clipped(indices)
        assert self._sums is not None
        # Added and divided in one pass; the divisor is a public constant.
        scale = self.noise_multiplier * self.sensitivity
        self._noise.add_(self._sums, scale, step=index, divisor=self.sampler.expected_batch_size)
        # From here the noisy sum counts as released, whatever interrupts the rest of the step.
        self.ledger.record(self.sampler.sample_rate, self.noise_multiplier)
        for name, parameter in self.parameters.items():
            parameter.grad = self._sums[name].to(parameter.dtype)  # no copy, but of half precision
        self.optimizer.step()
        self._check_weights()
        if self.scheduler is not None:
            self.scheduler.step()
        self._update_ema()
        return tally.step(self.index, self._spent())

    def _sum_clipped(self, indices: np.ndarray[Any, Any]) -> Tally:
        """Sum the batch's clipped gradients into the buffers, which are the gradients of the step before."""
        self.model.zero_grad()  # of all parameters: a frozen one with an old gradient would take steps with it
        if self._sums is None:
            self._sums = zero_sums(self.parameters)
        else:
            torch._foreach_zero_(list(self._sums.values()))
        tally = Tally()
        for chosen in self.microbatches.split(indices):
            batch = load_batch(self._dataset, chosen, self._collate_fn)
            try:
                result = clipped_sum(
                    self.model,
                    partial(self._loss_fn, self.model, follow(batch, len(chosen))),
                    max_grad_norm=self.max_grad_norm,
                    clipping=self.clipping,
                    into=self._sums,
                    **self._engine,
                )
            except MemoryBudgetError:  # of the plan: nothing was added to the sums
                if not self.microbatches.halve():
                    raise
                continue
            self.microbatches.planned(result.plan)
            if result.losses.shape[0] != len(chosen):
                raise LossShapeError(
                    f"loss_fn returned {result.losses.shape[0]} losses for {len(chosen)} examples: clipping would "
                    "protect something smaller or larger than an example.",
                    fix="return one loss per example of the batch; average several rows of one example first",
                )
            assert result.sensitivity == self.sensitivity
            if self.first_batches.due and not tally.verified:
                # After the sum, which knows the examples that cannot be compared; before anything is released.
                tally.verified = self._verify(chosen[result.norms.isfinite().cpu().numpy()][:COMPARED])
            tally.add(result, len(chosen), self.max_grad_norm)
        return tally

    def _verify(self, chosen: np.ndarray[Any, Any]) -> bool:
        """Compare these examples with plain autograd; returns whether there were any.

        Raises:
            CaptureError: the gradients are not exact.
        """
        if not len(chosen):
            return False

        def losses_of_a_batch() -> Callable[[], Tensor]:
            return partial(self._loss_fn, self.model, load_batch(self._dataset, chosen, self._collate_fn))

        self.first_batches.compare(self.model, losses_of_a_batch, len(chosen), self._engine["strategy"], self.index)
        return True

    def _check_weights(self) -> None:
        largest = torch._foreach_norm([p.detach() for p in self.parameters.values() if p.numel()], float("inf"))
        if not bool(torch.stack([norm.double() for norm in largest]).isfinite().all()):
            raise DivergedError(
                f"The weights are not finite after step {self.index}: more would spend epsilon and learn nothing.",
                fix="choose a smaller learning rate; what was saved before is as it was",
            )

    def _update_ema(self) -> None:
        if self.ema is None or self.ema_decay is None:
            return
        decay = min(self.ema_decay, (1.0 + self.index) / (10.0 + self.index))
        with torch.no_grad():
            averages = list(self.ema.values())
            torch._foreach_lerp_(averages, [self.parameters[name].detach() for name in self.ema], 1.0 - decay)

    def _spent(self) -> float:
        """Epsilon so far, for a progress bar."""
        # Resumed ledgers may hold other events than planned ones; then only the exact account is true.
        planned = Event(self.sampler.sample_rate, self.noise_multiplier, self.index)
        return self._curve.at(self.index) if self.ledger == Ledger([*self.prior, planned]) else self.epsilon()

    def _cuda_devices(self) -> list[int]:
        return [self._device.index or 0] if self._device.type == "cuda" else []

    @contextmanager
    def _randomness(self, index: int) -> Iterator[None]:
        """Under a seed, torch's own random numbers follow from (seed, step) too; no measurement decides."""
        if self.seed is None:
            yield
            return
        with torch.random.fork_rng(devices=self._cuda_devices()), builtin_rates():
            torch.manual_seed(torch_seed(self.seed, index))
            yield

    def set_performance(
        self, *, microbatch_size: int | str, strategy: str = "auto", memory_budget: float | None = None
    ) -> None:
        """Change what only time and memory depend on, for instance after a resume on another machine.

        Args:
            microbatch_size: as the constructor's; an unchanged "auto" keeps the size it had found.
            strategy: as the constructor's.
            memory_budget: as the constructor's.

        Raises:
            ConfigurationError: a value cannot work.
        """
        check_strategy(strategy)
        if microbatch_size != self._microbatch_size:
            self.microbatches = MicrobatchSize(microbatch_size, self._device, seeded=self.seed is not None)
            self._microbatch_size = microbatch_size
        self._engine.update(strategy=strategy, memory_budget=memory_budget)

    def certificate(self) -> dict[str, Any]:
        """What was guaranteed, to whom, by which mechanism; JSON-serialisable."""
        return certificate(self)

    def save(self, path: str | Path) -> None:
        """Write everything that `resume` needs to a folder; a crash leaves the old state or the new one.

        Neither the key of the noise nor any example is written.

        Args:
            path: the folder; made if missing.

        Raises:
            OutputPathError: it cannot be written.
        """
        checkpoint.write(Path(path), checkpoint.state_of(self), self.index)

    @classmethod
    def resume(
        cls,
        path: str | Path,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        dataset: Any,
        loss_fn: LossFunction,
        *,
        scheduler: Any = None,
        collate_fn: CollateFunction | None = None,
    ) -> PrivateTraining:
        """Continue a saved run, with a fresh noise key: no noise or batch is ever drawn twice.

        Model, optimizer and scheduler are built as for the saved run; their state is loaded in place.

        Args:
            path: the folder that `save` wrote.
            model: as the saved one.
            optimizer: as the saved one.
            dataset: the same examples.
            loss_fn: the same loss.
            scheduler: as the saved one.
            collate_fn: as for the saved run.

        Raises:
            RunFolderError: the folder is missing, damaged, or of another model, optimizer or scheduler.
            LedgerError: the dataset's size is not the saved run's.
        """
        state = checkpoint.read(Path(path))
        with checkpoint.reading(Path(path)):
            if check_dataset(dataset) != state["dataset_size"]:
                raise LedgerError(
                    f"The dataset has {len(dataset)} examples; the saved run's had {state['dataset_size']}. Its ledger "
                    "does not cover another dataset.",
                    fix="resume with the same dataset, or start a new run",
                )
            settings = {
                **state["settings"],
                "prior": Ledger.from_json(state["prior"]).events if "prior" in state else (),
            }
            training = cls(model, optimizer, dataset, loss_fn, scheduler=scheduler, collate_fn=collate_fn, **settings)
            checkpoint.restore(training, state, Path(path))
        return training
