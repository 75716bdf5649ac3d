"""Verification: the recorded gradients and clipped sums against plain autograd, one example at a time."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields

import numpy as np
import torch
from torch import Tensor, nn

from dither.capture.coverage import check_loss, leaves_of
from dither.capture.randomness import DrawnFrom
from dither.capture.watching import as_written
from dither.clipping.clipped_sum import ClippedSum, clipped_sum, per_example_gradients
from dither.clipping.gradients import Gradients
from dither.clipping.plan import STRATEGIES, check_strategy
from dither.clipping.recording import LossFunction, Recording, trainable
from dither.clipping.report import VerificationReport, VerifiedUse
from dither.errors import ConfigurationError, LossShapeError

__all__ = ["RandomState", "VerificationReport", "coarsest", "same_losses", "tolerance", "verify"]

_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4}
_ROUNDING_UNITS = 4


def verify(model: nn.Module, loss_fn: LossFunction, strategies: Sequence[str] = STRATEGIES) -> VerificationReport:
    """Compare per-example gradients, and clipped sums in each strategy, with autograd's, one example's loss at a time.

    The loss function is called several times from the same random state (torch's on the CPU and on the model's
    devices, Python's, numpy's), so it must use the same examples each time. The random state is left as it was found.

    Args:
        model: any module.
        loss_fn: no arguments; returns one loss per example, shape (B,).
        strategies: those of `clipped_sum` to compare.

    Returns:
        The largest relative error, by parameter and by strategy, and the uses; printable.

    Raises:
        CaptureError: its kinds, as `clipped_sum`; also if the examples influence each other.
        ConfigurationError: there is no example, or no such strategy, or an example whose gradient is not finite keeps
            autograd from giving the others'.
    """
    for strategy in strategies:
        check_strategy(strategy)
    parameters = trainable(model)
    state = RandomState(p.device for p in parameters.values())
    try:
        uses, losses = _uses(model, loss_fn)
        state.restore()
        recorded = per_example_gradients(model, loss_fn)
        state.restore()
        comparison = Comparison.of(parameters, loss_fn, recorded)
        repeats = same_losses(losses, comparison.losses, comparison.dtype)
        sums = {}
        for strategy in strategies:
            state.restore()
            result = clipped_sum(model, loss_fn, max_grad_norm=comparison.bound, strategy=strategy)
            repeats = repeats and same_losses(result.losses, comparison.losses, comparison.dtype)
            sums[strategy] = comparison.error_of(result)
    finally:
        state.restore()
    errors = comparison.errors()
    worst = max([*errors.values(), *sums.values()])
    examples = len(comparison.norms) - comparison.not_finite
    return VerificationReport(
        exact=worst <= comparison.tolerance and repeats and examples > 0,
        max_relative_error=worst,
        errors=errors,
        uses=uses,
        examples=examples,
        tolerance=comparison.tolerance,
        independent=len(comparison.norms) > 1,
        strategies=sums,
        shapes={name: tuple(p.shape) for name, p in parameters.items()},
        unused=tuple(name for name in parameters if name not in comparison.reached),
        zero=tuple(name for name in comparison.reached if comparison.size[name] == 0.0 and errors[name] == 0.0),
        not_finite=comparison.not_finite,
        repeats=repeats,
    )


class RandomState:
    """The global random states as they are now: torch's on the CPU and on some devices, Python's and numpy's.

    Args:
        devices: devices whose state is kept besides the CPU's.
    """

    def __init__(self, devices: Iterable[torch.device]) -> None:
        self._torch = DrawnFrom(devices)
        self._python, self._numpy = random.getstate(), np.random.get_state()

    def restore(self) -> None:
        """Put them back."""
        self._torch.restore()
        random.setstate(self._python)
        np.random.set_state(self._numpy)


def _uses(model: nn.Module, loss_fn: LossFunction) -> tuple[tuple[VerifiedUse, ...], Tensor]:
    """The recorded uses under "auto", and the losses; examples that influence each other are refused here."""
    recording = Recording(model, loss_fn)
    if not recording.batch:
        raise ConfigurationError(
            "loss_fn returned no losses: with no example nothing can be verified.", fix="give at least two examples"
        )
    names = {id(p): name for name, p in recording.parameters.items()}
    plan = Gradients([recording], "auto", None).plan
    found = []
    for planned, use in zip(plan.uses, recording.tape.uses, strict=True):
        own = names.get(id(use.parameter))
        behind = {id(leaf) for leaf in leaves_of(use.parameter)} if own is None else set()
        parameters = tuple(n for i, n in names.items() if i in behind) if own is None else (own,)
        shape = tuple(use.call.output_shape)
        kept = {f.name: getattr(planned, f.name) for f in fields(planned)}
        found.append(VerifiedUse(**kept, parameters=parameters, output_shape=shape, axis=use.axis))
    return tuple(found), recording.losses.detach()


@dataclass
class Comparison:
    """The oracle, accumulated example by example so that no more than one of its gradients is held.

    Attributes:
        dtype: the coarsest parameter's, real.
        losses: (B,), detached.
        bound: max_grad_norm of the clipped sums: the median norm, so that some examples are clipped and some are not.
        norms: by example, the oracle's norm over all parameters.
        not_finite: number of examples left out because no gradient of theirs is finite, here and there.
        reached: parameters that some loss reaches.
        wrong: by parameter, the squared norm of the difference over all examples.
        size: by parameter, the oracle's squared norm over all examples.
        sums: by parameter, the oracle's clipped sum.
        clipped_size: by parameter, as `size`, of the clipped gradients.
    """

    dtype: torch.dtype
    losses: Tensor
    bound: float
    norms: list[float] = field(default_factory=list)
    not_finite: int = 0
    reached: list[str] = field(default_factory=list)
    wrong: dict[str, float] = field(default_factory=dict)
    size: dict[str, float] = field(default_factory=dict)
    sums: dict[str, Tensor] = field(default_factory=dict)
    clipped_size: dict[str, float] = field(default_factory=dict)

    @classmethod
    @as_written()  # compiled code may refuse a second backward pass
    def of(cls, parameters: Mapping[str, Tensor], loss_fn: LossFunction, recorded: Mapping[str, Tensor]) -> Comparison:
        """Run the loss once more, as it is written, and autograd once an example."""
        with torch.enable_grad():
            losses = check_loss(loss_fn())
        batch = next(iter(recorded.values())).shape[0]
        if losses.shape[0] != batch:
            raise LossShapeError(
                f"loss_fn returned {batch} losses, then {losses.shape[0]}.", fix="use the same examples at every call"
            )
        ours = [_norm({name: recorded[name][i] for name in recorded}) for i in range(batch)]
        found = cls(coarsest(parameters.values()), losses.detach(), _median(ours))
        for name, parameter in parameters.items():
            found.wrong[name] = found.size[name] = found.clipped_size[name] = 0.0
            found.sums[name] = torch.zeros_like(_wide(parameter))
        for example in range(batch):
            found._add(parameters, losses[example], {name: recorded[name][example] for name in recorded}, ours[example])
            if _is_finite(ours[example]) and not _is_finite(found.norms[-1]) and not all(map(_is_finite, ours)):
                raise ConfigurationError(
                    f"The gradients of examples {[i for i in range(batch) if not _is_finite(ours[i])]} are not finite, "
                    f"and autograd spreads that to example {example}: there is nothing to compare with.",
                    fix="verify on examples with finite losses; in training clipping drops and counts the others",
                )
        found.reached = [name for name in parameters if name in found.reached]
        return found

    def _add(self, parameters: Mapping[str, Tensor], loss: Tensor, ours: Mapping[str, Tensor], norm: float) -> None:
        gradients = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True, allow_unused=True)
        truth = {name: _wide(g) for name, g in zip(parameters, gradients, strict=True) if g is not None}
        self.reached += [name for name in truth if name not in self.reached]
        self.norms.append(_norm(truth))
        if not _is_finite(self.norms[-1]) and not _is_finite(norm):
            self.not_finite += 1
            return
        factor = min(1.0, self.bound / self.norms[-1]) if self.norms[-1] else 1.0
        for name in parameters:
            gradient = truth.get(name)
            self.wrong[name] += _squared(_wide(ours[name]) if gradient is None else _wide(ours[name]) - gradient)
            if gradient is not None:
                self.size[name] += _squared(gradient)
                self.clipped_size[name] += factor**2 * _squared(gradient)
                self.sums[name] += factor * gradient

    @property
    def tolerance(self) -> float:
        """The relative error that rounding may cause."""
        return tolerance(self.dtype)

    def errors(self) -> dict[str, float]:
        """By parameter, the relative error of the per-example gradients."""
        return self._relative(self.wrong, self.size)

    def error_of(self, result: ClippedSum) -> float:
        """The largest relative error of a clipped sum by parameter, and of its norms; infinite if it dropped others."""
        if result.dropped != self.not_finite:
            return float("inf")
        wrong = {name: _squared(_wide(result.gradients[name]) - total) for name, total in self.sums.items()}
        # What a norm is wrong by matters in relation to the bound, if the norm is below it.
        of_norms = [
            abs(ours - truth) / max(truth, self.bound)
            for ours, truth in zip(result.norms.tolist(), self.norms, strict=True)
            if _is_finite(truth) or _is_finite(ours)
        ]
        every = [*self._relative(wrong, self.clipped_size).values(), *of_norms]
        return max(error if error == error else float("inf") for error in every)

    def _relative(self, wrong: Mapping[str, float], size: Mapping[str, float]) -> dict[str, float]:
        """Roots of the ratios; where that is above the tolerance within rounding, relative to the whole gradient.

        A gradient that cancels to zero (a bias before a normalisation) is rounding on both sides.
        """
        whole = sum(size.values()) ** 0.5
        rounding = _ROUNDING_UNITS * torch.finfo(self.dtype).eps * whole
        found = {}
        for name in wrong:
            difference, own = wrong[name] ** 0.5, size[name] ** 0.5
            error = 0.0 if difference == 0.0 else difference / own if own else float("inf")
            if not error <= self.tolerance and 0.0 < difference <= rounding:
                error = difference / whole
            found[name] = error if error == error else float("inf")
        return found


def coarsest(parameters: Iterable[Tensor]) -> torch.dtype:
    """The real dtype of least precision among the parameters'."""
    dtypes = (p.dtype.to_real() for p in parameters if p.is_floating_point() or p.is_complex())
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps, default=torch.get_default_dtype())


def tolerance(dtype: torch.dtype) -> float:
    """The relative error that rounding may cause."""
    return _TOLERANCE.get(dtype, 5e-2)


def same_losses(losses: Tensor, others: Tensor, dtype: torch.dtype) -> bool:
    """Whether two calls gave the same losses, up to rounding."""
    if losses.shape != others.shape:
        return False
    finite = others[others.isfinite()].double().abs()
    rounding = _ROUNDING_UNITS * torch.finfo(dtype).eps * (float(finite.max()) if len(finite) else 0.0)
    return torch.allclose(losses.double(), others.double(), rtol=tolerance(dtype), atol=rounding, equal_nan=True)


def _wide(tensor: Tensor) -> Tensor:
    """Dense, detached, in double precision."""
    dense = tensor.detach().to_dense() if tensor.layout is not torch.strided else tensor.detach()
    return dense.to(torch.complex128 if dense.is_complex() else torch.float64)


def _squared(tensor: Tensor) -> float:
    return float(tensor.abs().square().sum())


def _norm(gradients: Mapping[str, Tensor]) -> float:
    return float(sum(_squared(_wide(g)) for g in gradients.values()) ** 0.5)


def _median(norms: Sequence[float]) -> float:
    """The median of what is finite and above zero; 1 if nothing is."""
    ordered = sorted(norm for norm in norms if _is_finite(norm) and norm > 0.0)
    return ordered[len(ordered) // 2] if ordered else 1.0


def _is_finite(number: float) -> bool:
    return abs(number) < float("inf")
