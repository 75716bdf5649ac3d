"""One backward pass of flash clipping: norms, clip factors, weighted sums, into `.grad`. Legend: B examples."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from dither.capture.coverage import check_loss, untouched
from dither.capture.examples import ExampleAxis
from dither.capture.probing import Seed
from dither.capture.uses import ParamUse
from dither.clipping.clipped_sum import zero_sums
from dither.clipping.gradients import Gradients
from dither.clipping.repeats import Repeats
from dither.clipping.unformed import NotFormed
from dither.errors import CoverageError, LossShapeError, UnsupportedOpError
from dither.opacus import backward, batches, provenance
from dither.opacus.deciding import decide
from dither.opacus.graph import Reached, reach
from dither.opacus.recording import ModuleRecording
from dither.precision import FullPrecision
from dither.rules.rule import at_least_float32


def clipped_backward(
    hooks: Any, optimizer: Any, losses: Tensor, moved_bound: Callable[[Tensor], float] | None = None
) -> None:
    """Add the sum over examples of clipped gradients to `.grad` of every parameter of the module.

    Args:
        hooks: a `GradSampleHooksFastGradientClipping`.
        optimizer: the `DPOptimizerFastGradientClipping` that takes the gradients.
        losses: (B,), with their graph.
        moved_bound: of the norms, (B,): the bound to clip them at; None for the module's and the optimizer's own.

    Raises:
        LossShapeError: the losses are not one number per example of the module's batch.
        CaptureError: its kinds, where the sum could not be proved exact.
    """
    losses = check_loss(losses)
    reached = reach([losses])
    owners = backward.owners_of(reached)
    mine = owners.pop(hooks, [])
    _check(mine, losses, hooks)
    waiting = provenance.clipped_sums(optimizer.params)
    batches.check_order(mine, bool(waiting) or batches.sum_waits(optimizer.params))
    if not waiting:
        optimizer.zero_grad()
    elif not hooks.grad_accumulation_allowed:
        raise ValueError(
            "Poisson sampling is not compatible with grad accumulation. Call optimizer.step() after every "
            "forward/backward pass, or use BatchMemoryManager"
        )
    own_bound = _bound(hooks, optimizer)
    trained = [*mine[0].parameters.values(), *mine[0].kept]
    _refuse_hooks(mine[0].parameters)
    provenance.check([p for p in trained if p.grad is not None and (provenance.known(p) or bool(p.grad.any()))])
    batch = int(losses.shape[0])
    with backward.session(reached):
        with backward.quiet(reached):
            seed = Seed.of(losses, ExampleAxis(0, 1, batch, 1)) if batch else None
            decide(reached, [losses], seed, False)
        publish = [owner.prepare_backward(recordings) for owner, recordings in owners.items()]
        with untouched(backward.parameters_of(reached)):
            sums, bound = _clipped_sums(hooks, mine, losses, moved_bound or (lambda norms: own_bound), reached)
            optimizer.bound_of_the_sum = max(bound, getattr(optimizer, "bound_of_the_sum", 0.0))
        parameters = mine[0].parameters
        totals = provenance.totals_with(
            provenance.totals_of(trained), {parameters[n]: total for n, total in sums.items()}
        )
        backward.inject([parameters[n] for n in sums], list(sums.values()))
        for each in publish:
            each()
    batches.publish(mine, None, hooks.alive())
    provenance.clipped(trained, totals)


def _refuse_hooks(parameters: Mapping[str, Any]) -> None:
    """Raise UnsupportedOpError for hooks that would change a clipped sum."""
    hooked = [n for n, p in parameters.items() if p._backward_hooks or p._post_accumulate_grad_hooks]
    if hooked:
        raise UnsupportedOpError(
            f"Parameter {hooked[0]} has a gradient hook, which would change its clipped sum.",
            fix="remove the hook, and change gradients after optimizer.step() has added the noise, if at all",
        )


def _bound(hooks: Any, optimizer: Any) -> float:
    """The bound to clip at: the module's, or the optimizer's if that is smaller, since the noise is scaled by it."""
    module, noise = float(hooks.max_grad_norm), float(optimizer.max_grad_norm)
    if not math.isclose(module, noise, rel_tol=1e-6):
        warnings.warn(
            f"The module's max_grad_norm is {module:g}, the optimizer's {noise:g}: clipping at {min(module, noise):g}. "
            "Give both the same.",
            stacklevel=4,
        )
    return min(module, noise)


def _check(recordings: Sequence[ModuleRecording], losses: Tensor, hooks: Any) -> None:
    if not recordings:
        raise CoverageError(
            "The loss does not depend on a recorded forward of the private module.",
            fix="call the wrapped module in train mode with gradients enabled, then the loss on its output",
        )
    if any(recording.published for recording in recordings):
        raise CoverageError(
            "A second backward pass runs over the same forward: each example would be clipped twice.",
            fix="add the losses and call backward once: (loss_a + loss_b).backward()",
        )
    narrow = {x.dtype for x in (losses, *recordings[0].kept) if x.dtype != at_least_float32(x.dtype)}
    if recordings[0].kept and narrow:
        raise UnsupportedOpError(
            f"A layer with a registered grad sampler gets its clipped sum from autograd, here in {narrow.pop()}, whose "
            "rounding may move the sum by more than the bound.",
            fix="keep the layer and the losses in float32, or remove the registered sampler",
        )
    for recording in recordings:
        count = int(losses.shape[0])
        if count in recording.input_sizes and (count in recording.output_sizes or not recording.output_sizes):
            recording.batch = count
        elif losses.shape[0] != recording.batch:
            raise LossShapeError(
                f"The loss has {losses.shape[0]} entries, shape {tuple(losses.shape)}; the module's batch has "
                f"{recording.batch} examples.",
                fix="reduce the loss to one number per example: give the loss object shape=logits.shape if it is per "
                "token, or\n    loss = criterion(...)  # (B, ...), unreduced\n    return loss.flatten(1).mean(1)",
            )


def _clipped_sums(
    hooks: Any,
    recordings: Sequence[ModuleRecording],
    losses: Tensor,
    bound_of: Callable[[Tensor], float],
    reached: Reached,
) -> tuple[dict[str, Tensor], float]:
    """By name, the sum over examples of clipped gradients; and the bound that the norms were clipped at."""
    parameters, kept = recordings[0].parameters, recordings[0].kept
    sums = zero_sums(parameters)
    # The loss is sent back as the user's reduction has it, for the sake of whatever else it reaches.
    scale = hooks.loss_scale(max(1, len(losses)))
    again = bool(kept) or hooks.strategy == "two_pass"
    repeats = Repeats() if hooks.strategy == "two_pass" else None
    gradients = hooks.collect(recordings, repeats=repeats, scaled=bool(kept))
    with _restored(kept):
        undecided = any(recording.undecided for recording in recordings)
        backward.send(reached, [losses], [torch.full_like(losses, 1.0 / scale)], again or undecided)
        backward.settle(recordings)
    with torch.no_grad():
        norms = hooks.set_norms(recordings[0], gradients, scale)
        dropped = ~torch.isfinite(norms)
        bound = bound_of(norms)
        factors = torch.where(dropped, 0.0, (bound / (norms + 1e-6)).clamp(max=1.0))
    if again:
        others = [leaf for leaf in reached.leaves if not any(leaf is p for p in kept)]
        with hooks.quiet_hooks(), _restored(others):
            second = _second_pass(hooks, recordings, reached, losses, factors, dropped, gradients, repeats, sums)
            gradients = second or gradients
    if not (hooks.strategy == "two_pass" and bool(dropped.any())):
        factors = factors * scale
    with torch.no_grad():
        gradients.add_weighted_sum(factors, sums, dropped)
    return sums, bound


def _second_pass(
    hooks: Any,
    recordings: Sequence[ModuleRecording],
    reached: Reached,
    losses: Tensor,
    factors: Tensor,
    dropped: Tensor,
    first: Gradients,
    repeats: Repeats | None,
    sums: dict[str, Tensor],
) -> Gradients | None:
    """Send the weighted losses back: for layers with registered samplers, and for gradients that were not kept.

    Returns:
        New collectors, if examples were dropped: their gradients must be left out, not multiplied by zero.
    """
    if bool(dropped.any()):
        if recordings[0].kept:
            raise CoverageError(
                "An example's gradient is not finite, and a layer has a registered grad sampler.",
                fix="remove the example, or the registered sampler: then the example is left out by itself",
            )
        again: Gradients = hooks.collect(recordings, strategy="tile")
        backward.send(reached, [losses], [torch.ones_like(losses)], False)
        return again
    # A registered sampler's layer gets its clipped sum from autograd, from weighted losses. Otherwise what is weighted
    # is, to the last bit, what the norms were taken of.
    scale = hooks.loss_scale(max(1, len(losses)))
    sent = factors.to(losses.dtype) if recordings[0].kept else torch.full_like(losses, 1.0 / scale)
    weights = torch.ones_like(factors) if recordings[0].kept else factors * scale

    def repeated(use: ParamUse, gradient: Tensor) -> None:
        assert repeats is not None
        repeats.check(use, gradient, factors * scale if recordings[0].kept else None)

    for recording in recordings:
        adds = repeats is not None
        recording.tape.sink = _adding(recording, first, sums, weights, repeated) if adds else backward.ignore
    backward.send(reached, [losses], [sent], False)
    if repeats is not None:
        repeats.check_all_met()
    return None


def _adding(
    recording: ModuleRecording,
    gradients: Gradients,
    sums: dict[str, Tensor],
    weights: Tensor,
    repeated: Callable[[ParamUse, Tensor], None],
) -> backward.Sink:
    """A sink that adds up the weighted gradients of what the first pass did not keep, once `repeated` let them pass."""
    uses = recording.uses_by_call()

    def sink(call: int, gradient: Tensor) -> None:
        for use in uses.get(call, []):
            collector = gradients.collectors.get(use.name)
            if isinstance(collector, NotFormed) and collector.needs_pass:
                repeated(use, gradient)
                if use.axis is None:  # nothing but zeros arrives
                    continue
                use.call.check_unchanged()
                with FullPrecision():
                    use.rule.add_weighted_sum(use, gradient, weights, sums[use.name])
        if call in uses and not any(gradients.keeps_inputs(use) for use in uses[call]):
            recording.tape.calls[call].conceal()

    return sink


@contextmanager
def _restored(leaves: Sequence[Tensor]) -> Iterator[None]:
    """Leaves' `.grad` is afterwards what it was."""
    before = [leaf.grad for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    yield
    for leaf, gradient in zip(leaves, before, strict=True):
        leaf.grad = gradient
