"""Flash clipping: Opacus's fast gradient and ghost clipping classes, in one backward pass.

Opacus runs backward twice, for the norms and for the weighted loss. Here one pass over the recorded forward gives the
norms (Li et al. 2022, arXiv:2110.05679, section 4) and keeps what the weighted sum needs (Bu et al. 2023,
arXiv:2210.00038). Legend: B examples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dither.clipping.clipped_sum import zero_sums
from dither.clipping.gradients import Gradients
from dither.clipping.plan import Plan, check_strategy
from dither.clipping.repeats import Repeats
from dither.errors import CoverageError
from dither.opacus import backward, batches, provenance, stock
from dither.opacus.hooks import GradSampleHooks, plain_gradients, receiver
from dither.opacus.recording import ModuleRecording
from dither.rules.rule import at_least_float32

_stock_init = stock.GradSampleHooksFastGradientClipping.__init__
_stock_zero_grad = stock.AbstractGradSampleModule.zero_grad
_stock_module_init = stock.GradSampleModuleFastGradientClipping.__init__


class GradSampleHooksFastGradientClipping(GradSampleHooks, stock.GradSampleHooksFastGradientClipping):
    """Per-example gradient norms of an unwrapped module; see `GradSampleModuleFastGradientClipping`."""

    def __init__(
        self, m: nn.Module, *, strategy: str = "auto", memory_budget: float | None = None, **options: Any
    ) -> None:
        _stock_init(self, m, **options)
        configure(self, strategy, memory_budget)

    def prepare_backward(self, recordings: list[ModuleRecording]) -> Callable[[], object]:
        """For a loss that is sent back by hand: norms and ordinary gradients; with hooks disabled, only the latter."""
        if not self.hooks_enabled:
            publish = plain_gradients(recordings)
            normed = all(recording.published for recording in recordings)

            def publish_and_mark() -> None:
                parameters = list(recordings[0].parameters.values())
                before = provenance.totals_of(parameters)
                sums = publish()
                if normed:
                    provenance.weighted(parameters, provenance.totals_with(before, sums))
                else:
                    provenance.unclipped(parameters)

            return publish_and_mark
        gradients = self.collect(recordings, self.loss_scale(recordings[0].batch))
        return partial(self._publish_norms, recordings, gradients)

    def collect(
        self,
        recordings: Sequence[ModuleRecording],
        scale: float = 1.0,
        strategy: str = "",
        repeats: Repeats | None = None,
        scaled: bool = False,
    ) -> Gradients:
        """Collectors for what arrives at the recordings' uses, times `scale`.

        With `repeats` they keep norms only, where possible, for another pass, which may send `scaled` losses.

        Raises:
            CoverageError: the recordings have different numbers of examples.
            UnknownStrategyError: the strategy was changed to what is none.
        """
        batches.check_same_batch(recordings)
        check_strategy(strategy or self.strategy)
        gradients = Gradients(recordings, strategy or self.strategy, self.memory_budget)
        for recording in recordings:
            recording.tape.sink = receiver(recording, gradients, scale, repeats, scaled)
        self.plan = gradients.plan
        return gradients

    def _publish_norms(self, recordings: list[ModuleRecording], gradients: Gradients) -> None:
        batch = recordings[0].batch
        self.set_norms(recordings[0], gradients, 1.0)
        weights = torch.full((batch,), 1.0 / self.loss_scale(max(1, batch)), dtype=torch.float64)
        sums = zero_sums(recordings[0].parameters)
        gradients.add_weighted_sum(weights.to(recordings[0].device), sums, weights == 0)
        backward.inject([recordings[0].parameters[n] for n in sums], list(sums.values()))
        provenance.unclipped(recordings[0].parameters.values())
        for recording in recordings:
            recording.published = True

    def set_norms(self, recording: ModuleRecording, gradients: Gradients, scale: float) -> Tensor:
        """Set each parameter's `_norm_sample`; return the norms over all parameters, (B,), float64.

        Args:
            recording: whose parameters they are.
            gradients: what was collected.
            scale: what the collected gradients are multiplied by.
        """
        squares = gradients.squared_norms()
        norms = gradients.norms(squares=squares) * scale
        for name, parameter in recording.parameters.items():
            square = squares.get(name)
            norm = torch.zeros_like(norms) if square is None else square.clamp_min(0).sqrt() * scale
            vars(parameter)["_norm_sample"] = norm.to(at_least_float32(parameter.dtype))
        for parameter in recording.kept:
            norms = (norms.square() + parameter._norm_sample.to(norms).square()).sqrt()
        self.per_sample_gradient_norms = norms.to(torch.float32)
        return norms

    def get_norm_sample(self) -> Tensor:
        """Per-example norms over all trainable parameters, (B,), of the last backward pass. Not private."""
        norms = [p._norm_sample for p in self._module.parameters() if p.requires_grad and hasattr(p, "_norm_sample")]
        if not norms:
            raise CoverageError(
                "There are no per-example norms: no backward pass through this module was recorded yet.",
                fix="call the module in train mode, then backward on its loss",
            )
        total: Tensor = torch.stack([norm.to(norms[0].device) for norm in norms], dim=0).norm(2, dim=0)
        self.per_sample_gradient_norms = total
        return total


class GradSampleModuleFastGradientClipping(
    GradSampleHooksFastGradientClipping, stock.GradSampleModuleFastGradientClipping
):
    """Per-example gradient norms of any module, whatever its forward takes, without forming the gradients.

    Args:
        m: the module.
        strategy: "auto", "hold", "ghost", "tile" or "two_pass"; changes time and memory, never the result.
            `use_ghost_clipping=False` stands for "tile", where "auto" is not told otherwise.
        memory_budget: bytes that held per-example gradients may take, unless "hold" asks for them; None for half of the
            free memory with "auto", else for no bound.
        options: as `opacus.GradSampleModuleFastGradientClipping`: batch_first, loss_reduction, strict, force_functorch,
            max_grad_norm, use_ghost_clipping.

    Attributes:
        plan: the strategy of each use in the last backward pass; printable.
        per_sample_gradient_norms: (B,), of the last backward pass. Not private.

    Raises:
        UnknownStrategyError: no such strategy.
        NotImplementedError: a layer keeps running statistics of the examples.
    """

    def __init__(
        self, m: nn.Module, *, strategy: str = "auto", memory_budget: float | None = None, **options: Any
    ) -> None:
        _stock_module_init(self, m, **options)
        configure(self, strategy, memory_budget)

    def zero_grad(self, set_to_none: bool = False) -> None:
        """Clear `.grad` and `.grad_sample`."""
        _stock_zero_grad(self, set_to_none)
        provenance.cleared(list(self.parameters()))


def configure(hooks: Any, strategy: str, memory_budget: float | None) -> None:
    """Set how a hooks object spends time and memory."""
    check_strategy(strategy)
    hooks.strategy = "tile" if strategy == "auto" and not hooks.use_ghost_clipping else strategy
    hooks.memory_budget = memory_budget
    hooks.plan = Plan(())
