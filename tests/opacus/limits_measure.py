"""What a row of the table comes out as: with Opacus, with dither, and one example at a time.

Every run starts from a fresh row (seeded), takes the row's steps with noise 0 and learning rate 0, and reads what the
optimizer would add noise to: the sum of clipped gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from limits_row import Make, Row
from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping
from torch import Tensor

import dither.opacus
import oracle
from dither.errors import DitherError

C = 1.0
"""The clipping norm of every run."""
EXACT = 1e-10
MODES = ("hooks", "ghost")

OPACUS = SimpleNamespace(
    GradSampleModule=GradSampleModule,
    GradSampleModuleFastGradientClipping=GradSampleModuleFastGradientClipping,
    DPOptimizer=DPOptimizer,
    DPOptimizerFastGradientClipping=DPOptimizerFastGradientClipping,
    DPLossFastGradientClipping=DPLossFastGradientClipping,
)
"""Opacus's own classes, without `install()`."""
DITHER = dither.opacus


def fresh(make: Make) -> Row:
    """The row in float64, the same each time."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    try:
        return make()
    finally:
        torch.set_default_dtype(default)


def truth(make: Make) -> dict[str, Tensor]:
    """Each example's gradient on the unwrapped model, for the batches that count in the last step."""
    row = fresh(make)
    row.before(row.model)
    row.after(row.model)
    found: list[dict[str, Tensor]] = []
    for batch in row.batches(None):
        torch.manual_seed(7)
        found.append(_gradients(row, batch))
    counted = found if row.accumulate else found[-1:]
    return {name: torch.cat([step[name] for step in counted]) for name in counted[0]}


def _gradients(row: Row, batch: tuple[Any, ...]) -> dict[str, Tensor]:
    losses = (row.reference or row.losses)(row.model, *batch)
    if not len(losses):
        return {name: p.new_zeros(0, *p.shape) for name, p in row.model.named_parameters()}
    if not row.alone:
        return oracle.per_example_gradients(row.model, lambda: losses)
    single = [tuple(row.keep(k, v, [i]) for k, v in enumerate(batch)) for i in range(len(losses))]
    found = [oracle.per_example_gradients(row.model, lambda one=one: row.losses(row.model, *one)) for one in single]
    return {name: torch.cat([one[name] for one in found]) for name in found[0]}


def norms(gradients: dict[str, Tensor]) -> Tensor:
    """Per-example norms over all parameters, (B,), of any number of examples."""
    return sum(g.double().unsqueeze(1).flatten(1).square().sum(1) for g in gradients.values()).sqrt()


def clipped_sum(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """The sum of clipped gradients with Opacus's factors, min(1, C / (norm + 1e-6))."""
    factors = (C / (norms(gradients) + 1e-6)).clamp(max=1.0)
    return {name: torch.einsum("b,b...->...", factors.to(g.dtype), g) for name, g in gradients.items()}


def run(api: Any, mode: str, make: Make, kept: Sequence[int] | None = None) -> tuple[dict[str, Tensor], Any]:
    """The sum of clipped gradients by parameter, and in hooks mode the per-example gradients.

    Args:
        api: OPACUS or DITHER.
        mode: "hooks" or "ghost".
        make: the row.
        kept: examples that take part; None for all.
    """
    row = fresh(make)
    row.before(row.model)
    wrap = api.GradSampleModule if mode == "hooks" else api.GradSampleModuleFastGradientClipping
    options = {} if mode == "hooks" else {"max_grad_norm": C}
    wrapped = wrap(row.model, **options, **row.options)
    row.after(row.model)
    sgd = torch.optim.SGD([p for p in row.model.parameters() if p.requires_grad], lr=0.0)
    kind = api.DPOptimizer if mode == "hooks" else api.DPOptimizerFastGradientClipping
    optimizer = kind(sgd, noise_multiplier=0.0, max_grad_norm=C, expected_batch_size=4)
    batches = row.batches(kept)
    for count, batch in enumerate(batches, 1):
        torch.manual_seed(7)
        if mode == "hooks":
            loss = row.total(row.losses(wrapped, *batch))
        else:
            criterion = row.criterion or (lambda *args: row.losses(*args))
            loss = api.DPLossFastGradientClipping(wrapped, optimizer, criterion)(wrapped, *batch)
        row.backward(loss)
        if count < len(batches) and not row.accumulate:
            optimizer.step()
            optimizer.zero_grad()
    named = {name: p for name, p in row.model.named_parameters() if p.requires_grad}
    samples = {name: getattr(p, "grad_sample", None) for name, p in named.items()}
    samples = {name: torch.cat(s) if isinstance(s, list) else s for name, s in samples.items()}
    optimizer.step()
    return {name: p.summed_grad.detach().clone() for name, p in named.items()}, samples if mode == "hooks" else None


def deviation(api: Any, mode: str, make: Make, true: dict[str, Tensor]) -> float:
    """Relative error of the clipped sum and, in hooks mode, of the per-example gradients; the larger one."""
    total, samples = run(api, mode, make)
    kept = torch.isfinite(norms(true))
    errors = [oracle.relative_error(total, clipped_sum({n: g[kept] for n, g in true.items()}))]
    if samples is not None and len(kept):
        if any(samples[n].shape != g.shape for n, g in true.items()):
            return float("inf")
        pairs = [{n: g[kept] for n, g in found.items()} for found in (samples, true)]
        errors.append(oracle.relative_error(*pairs))
    return sum(errors) if any(e != e for e in errors) else max(errors)


def contribution(api: Any, mode: str, make: Make) -> float:
    """How far the clipped sum moves when one example is left out, over C; the largest of the batch."""
    whole, _ = run(api, mode, make)
    row = fresh(make)
    examples = len(row.losses(row.model, *row.inputs))
    moved = [0.0]
    for left_out in range(examples):
        part, _ = run(api, mode, make, [i for i in range(examples) if i != left_out])
        squares = sum(float((whole[n] - part[n]).square().sum()) for n in whole)
        moved.append(squares**0.5 / C)
    return max(moved)


@dataclass(frozen=True)
class Outcome:
    """What came out of a row: a category, and words for the table."""

    category: str
    words: str


def outcome(api: Any, mode: str, make: Make) -> Outcome:
    """Measure a row."""
    true = truth(make)
    try:
        error = deviation(api, mode, make, true)
    except Exception as failure:
        name = type(failure).__name__
        refused = isinstance(failure, DitherError)
        return Outcome(f"error: {name}", f"{'refused' if refused else 'error'}: `{name}`")
    if error != error:
        return Outcome("silently wrong", "silent, all NaN")
    moved = 0.0 if fresh(make).random else _contribution_or_none(api, mode, make)
    found = [f"{moved:.3g}×C"] if moved > 1 + 1e-6 else []
    if error > EXACT:
        found.append("wrong shape" if error == float("inf") else f"{error:.0%} off")
    return Outcome("silently wrong", "silent, " + ", ".join(found)) if found else Outcome("exact", "exact")


def _contribution_or_none(api: Any, mode: str, make: Make) -> float:
    """The contribution, or 0 where the smaller batch is an error."""
    try:
        return contribution(api, mode, make)
    except Exception:
        return 0.0
