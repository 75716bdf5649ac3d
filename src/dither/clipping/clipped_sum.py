"""The public functions: clipped sums, per-example gradients and per-example norms of any model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dither.capture.uses import ParamUse
from dither.clipping.functions import clipping_function
from dither.clipping.gradients import Gradients
from dither.clipping.plan import Plan, check_strategy
from dither.clipping.recording import LossFunction, Recording
from dither.clipping.repeats import Repeats
from dither.clipping.unformed import NotFormed
from dither.errors import ConfigurationError, ExampleAxisError
from dither.precision import FullPrecision
from dither.rules.rule import at_least_float32


@dataclass(frozen=True)
class ClippedSum:
    """A sum of clipped per-example gradients and what is known of it.

    Attributes:
        gradients: by parameter name, the sum over examples of clipped gradients, the parameter's shape; its dtype, but
            float32 where that is less.
        norms: unclipped per-example norms, (B,), float32 or wider; not finite for dropped examples. Not private.
        losses: per-example losses, (B,), detached. Not private.
        sensitivity: L2 norm by which adding or removing one example can change the sum.
        dropped: number of examples left out because their gradient is not finite. Not private.
        plan: the strategy of each use; printable.
    """

    gradients: dict[str, Tensor]
    norms: Tensor
    losses: Tensor
    sensitivity: float
    dropped: int
    plan: Plan


def clipped_sum(
    model: nn.Module,
    loss_fn: LossFunction,
    *,
    max_grad_norm: float = 1.0,
    clipping: str = "flat",
    strategy: str = "auto",
    rows_per_example: int | None = None,
    memory_budget: float | None = None,
    into: dict[str, Tensor] | None = None,
    randomness: str = "different",
) -> ClippedSum:
    """Sum of per-example gradients, each scaled to norm at most `max_grad_norm`, in one forward and one backward pass.

    Guarantee: adding or removing one example changes the returned sum by at most `sensitivity` in L2 norm (up to
    rounding in float32, or wider), for every strategy, provided that the loss of an example depends on that example
    alone, which is proved on the first batch and whenever the recorded operations change. The sum has no noise: it is
    not private.

    Args:
        model: any module; its trainable parameters are recorded while `loss_fn` runs.
        loss_fn: no arguments; calls the model and returns one loss per example, shape (B,).
        max_grad_norm: C, the bound on each example's gradient norm over all parameters.
        clipping: "flat" (Abadi et al. 2016, algorithm 1).
        strategy: "auto", "hold", "ghost", "tile" or "two_pass"; changes time and memory, never the result.
        rows_per_example: k, if the model sees k consecutive rows for each example (k noise draws of one image); the
            layout is found without it, and checked against it.
        memory_budget: bytes that held per-example gradients may take, unless "hold" asks for them; None for half of the
            free memory with "auto", else for no bound. What has to be held (of biases and scales, operations without a
            rule, tensors computed from a parameter, or several uses whose rows cannot be multiplied) is refused beyond
            it.
        into: tensors by parameter name, float32 or wider; the sum is added to them in place (accumulation over
            micro-batches).
        randomness: of a random operation that takes a parameter and has no rule: "different" numbers for each example,
            as plain PyTorch draws them; the "same" numbers for each; or an "error".

    Returns:
        The sum and its sensitivity.

    Raises:
        UnknownStrategyError: no such strategy.
        MemoryBudgetError: what has to be held takes more than memory_budget.
        LossShapeError: the loss is not of shape (B,).
        CoupledExamplesError: an example's loss depends on another example.
        CoverageError: a parameter receives gradient around the recorder; or the second pass of "two_pass" does not
            repeat the first.
        CaptureError: its other kinds, where the result could not be proved exact.
        ConfigurationError: an argument cannot work; a tensor of `into` is missing, of another shape, or of less than
            float32.
    """
    check_strategy(strategy)
    clip = clipping_function(clipping, max_grad_norm)
    recording = Recording(model, loss_fn, _check_randomness(randomness))
    _check_rows(recording, rows_per_example)
    sums = _sums(recording.parameters, into)
    gradients = Gradients([recording], strategy, memory_budget)
    repeats = Repeats() if strategy == "two_pass" else None
    norms = _collect(recording, gradients, repeats)
    if repeats is not None and not gradients.complete:  # rare: what was forgotten is needed after all
        gradients, repeats = Gradients([recording], "tile", memory_budget), None
        norms = _collect(recording, gradients)
    factors, dropped = clip.factors(norms), None
    if not gradients.complete:
        dropped = ~torch.isfinite(norms)
        factors = torch.where(dropped, 0.0, factors)
    if repeats is not None and recording.batch:
        _second_pass(recording, gradients, repeats, factors, sums)
    with torch.no_grad():
        gradients.add_weighted_sum(factors, sums, dropped)
    wide = torch.promote_types(recording.losses.dtype, torch.float32)
    left_out = 0 if dropped is None else int(dropped.sum())
    return ClippedSum(sums, norms.to(wide), recording.losses.detach(), clip.sensitivity, left_out, gradients.plan)


def per_example_gradients(
    model: nn.Module, loss_fn: LossFunction, *, randomness: str = "different"
) -> dict[str, Tensor]:
    """Each example's gradient of its own loss.

    Args:
        model: any module.
        loss_fn: no arguments; returns one loss per example, shape (B,).
        randomness: as `clipped_sum`.

    Returns:
        By parameter name, shape (B, *parameter.shape). A parameter that no loss reaches has zeros.

    Raises:
        CaptureError: its kinds, as `clipped_sum`.
    """
    recording = Recording(model, loss_fn, _check_randomness(randomness))
    gradients = Gradients([recording], "hold", None)
    _collect(recording, gradients)
    found = {}
    for name, parameter in recording.parameters.items():
        formed = gradients.formed(name)
        # Held gradients may be views, or live in memory that the next step uses again: the caller gets its own.
        found[name] = parameter.new_zeros(recording.batch, *parameter.shape) if formed is None else formed.clone()
    return found


def per_example_norms(model: nn.Module, loss_fn: LossFunction, *, randomness: str = "different") -> Tensor:
    """Each example's gradient norm over all trainable parameters, without keeping its gradient.

    Args:
        model: any module.
        loss_fn: no arguments; returns one loss per example, shape (B,).
        randomness: as `clipped_sum`.

    Returns:
        Shape (B,), float32 or wider.

    Raises:
        CaptureError: its kinds, as `clipped_sum`.
    """
    recording = Recording(model, loss_fn, _check_randomness(randomness))
    gradients = Gradients([recording], "two_pass", None)
    norms = _collect(recording, gradients)
    return norms.to(torch.promote_types(recording.losses.dtype, torch.float32))


def _collect(recording: Recording, gradients: Gradients, repeats: Repeats | None = None) -> Tensor:
    """One backward pass, and the norms; `repeats` where another follows, for what is forgotten until then."""

    def receive(use: ParamUse, grad_output: Tensor) -> bool:
        gradients.receive(use, grad_output)
        collector = gradients.collectors.get(use.name)
        if repeats is not None and isinstance(collector, NotFormed):
            if collector.needs_pass:
                repeats.note(use, grad_output)
            collector.forget()
        return gradients.keeps_inputs(use)

    if recording.batch:
        recording.backward(receive, keep_graph=repeats is not None)
    with torch.no_grad():
        return gradients.norms(widen=repeats is None)


def _second_pass(
    recording: Recording, gradients: Gradients, repeats: Repeats, factors: Tensor, sums: Mapping[str, Tensor]
) -> None:
    """Send the losses back as before, so that what is weighted is, to the last bit, what the norms were taken of.

    The sums are kept apart until all of it is proved to be that.
    """
    found: dict[str, Tensor] = {}

    def receive(use: ParamUse, grad_output: Tensor) -> bool:
        collector = gradients.collectors.get(use.name)
        if isinstance(collector, NotFormed) and collector.needs_pass:
            repeats.check(use, grad_output)
            if use.name not in found:
                found[use.name] = torch.zeros_like(sums[use.name])
            with FullPrecision():
                use.rule.add_weighted_sum(use, grad_output, factors, found[use.name])
        return gradients.keeps_inputs(use)

    recording.backward(receive)
    repeats.check_all_met()
    for name, total in found.items():
        sums[name].add_(total)


def _sums(parameters: Mapping[str, Tensor], into: dict[str, Tensor] | None) -> dict[str, Tensor]:
    if into is None:
        return zero_sums(parameters)
    for name, parameter in parameters.items():
        fits = name in into and into[name].shape == parameter.shape
        if not fits or not (into[name].is_floating_point() or into[name].is_complex()):
            got = f"{tuple(into[name].shape)}, {into[name].dtype}" if name in into else "nothing"
            raise ConfigurationError(
                f"`into` needs a floating-point tensor of shape {tuple(parameter.shape)} for parameter {name}; it has "
                f"{got}.",
                fix="pass the .gradients of an earlier clipped_sum, or zeros shaped like every trainable parameter",
            )
        if into[name].dtype != at_least_float32(into[name].dtype):
            raise ConfigurationError(
                f"`into` has a tensor of {into[name].dtype} for parameter {name}: rounding a running sum between "
                "micro-batches may move it by more than max_grad_norm, which the noise is for.",
                fix="give float32 tensors, as the .gradients of an earlier clipped_sum are; round after the noise",
            )
    return into


def zero_sums(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Zeros to add clipped gradients to, by name: each parameter's shape and dtype, but float32 where that is less."""
    dtypes = {name: at_least_float32(p.dtype) for name, p in parameters.items()}
    return {name: torch.zeros_like(p, requires_grad=False, dtype=dtypes[name]) for name, p in parameters.items()}


def _check_rows(recording: Recording, rows_per_example: int | None) -> None:
    if rows_per_example is None:
        return
    if rows_per_example < 1:
        raise ConfigurationError(f"rows_per_example must be at least 1; it is {rows_per_example}.", fix="pass None")
    for use in recording.tape.uses:
        axis = use.axis
        if axis is None or axis.batch == 1 or (axis.inner == 1 and axis.outer == 1):
            continue
        if axis.outer != 1 or axis.inner % rows_per_example:
            raise ExampleAxisError(
                f"{use.call.name} (parameter {use.name}) sees {axis.outer * axis.inner} rows per example, in runs of "
                f"{axis.inner}; rows_per_example={rows_per_example} says otherwise.",
                fix="repeat each example's rows consecutively (repeat_interleave, not repeat), or leave it None",
            )


def _check_randomness(randomness: str) -> str:
    if randomness not in ("different", "same", "error"):
        raise ConfigurationError(
            f"randomness must be 'different', 'same' or 'error'; it is {randomness!r}.", fix="'different'"
        )
    return randomness
