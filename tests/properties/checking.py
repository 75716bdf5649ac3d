"""One generated model against the oracle: exact or refused by name, in every strategy, and neighbours within the bound.

What is compared, each as the norm of the difference over all parameters and examples:
- per-example gradients and norms, relative to the truth's norm;
- clipped sums, relative to the sum of the clipped norms: what is added, as examples may cancel to nothing.

The truth is the oracle's in float64; float64 must be within 1e-10 of it, float32 within 1e-5. Some models lose more by
themselves (rounding carries a ReLU's input over zero; a normalisation divides by almost nothing). Plain float32
autograd measures that: a case is well conditioned if plain float32 is within 1e-6 of the truth. Otherwise dither may be
ten times as far off as plain autograd is in float32, and as that scales to float64's precision. Where plain float32 has
not one digit right, the gradient is rounding alone, and is compared to 1e-5 instead of to itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

import dither
import oracle
from dither.errors import CaptureError
from properties.models import Case, make_case
from properties.program import Program

STRATEGIES = ("auto", "hold", "ghost", "tile", "two_pass")
FUNCTIONS = ("gradients", "norms", *STRATEGIES)
_BOUND = {torch.float64: 1e-10, torch.float32: 1e-5}
_WELL_CONDITIONED = 1e-6
_DIGITS = 2.0**-29  # float64's precision over float32's
_EXTREMES = (1e30, float("nan"), 5e-324, 1e200, float("inf"), 1e-30)


@dataclass(frozen=True)
class Outcome:
    """What one function of dither did with one model.

    Attributes:
        function: "gradients", "norms" or a strategy of the clipped sum.
        kind: "exact", "refused", "equal" (wrong on purpose, yet equal to the oracle) or "failed".
        why: the refusal's error, or the kind of failure.
        detail: in words.
        error_64, error_32: relative errors where it was exact.
        conditioned: whether the case was compared at 1e-10 and 1e-5.
        neighbours: number of neighbouring pairs compared.
    """

    function: str
    kind: str
    why: str = ""
    detail: str = ""
    error_64: float = 0.0
    error_32: float = 0.0
    conditioned: bool = True
    neighbours: int = 0


class BrokenPromiseError(Exception):
    """dither's result is not what it promises: "inexact", "moved" (by more than the bound) or "unnoticed"."""

    def __init__(self, kind: str, what: str) -> None:
        self.kind = kind
        super().__init__(what)


@dataclass(frozen=True)
class Truth:
    """The oracle's answer for a case."""

    gradients: dict[str, Tensor]
    norms: Tensor

    @staticmethod
    def of(case: Case) -> Truth | None:
        """None where there is no per-example loss, or none that a parameter reaches."""
        losses = case.loss_fn()()
        if not isinstance(losses, Tensor) or losses.dim() != 1 or not losses.requires_grad:
            return None
        gradients = oracle.per_example_gradients(case.model, case.loss_fn())
        return Truth(gradients, oracle.norms(gradients))

    def summed(self, bound: float) -> dict[str, Tensor]:
        return oracle.clipped_sum(self.gradients, bound)


class Check:
    """A program's model in both precisions, and the truth about it.

    Args:
        program: the generated model.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self._code = compile(program.source, "<generated model>", "exec")
        self.double = make_case(program, torch.float64, self._code)
        self.single = make_case(program, torch.float32, self._code)
        self.truth = Truth.of(self.double)
        self.bound, self.conditioned, self._floor = 1.0, True, 0.0
        self.allowed = dict(_BOUND)
        if self.truth is not None:
            # Some examples are clipped, some are not; squares of norms below 1e-19 would underflow in float32.
            self.bound = max(float(self.truth.norms.median()), 1e-9)
            self._condition(self.truth)

    def _condition(self, truth: Truth) -> None:
        """Measure what plain float32 autograd loses."""
        plain = Truth.of(self.single)
        assert plain is not None
        lost = max(self._errors(truth, plain.gradients, plain.norms, plain.summed(self.bound)))
        self.conditioned = lost <= _WELL_CONDITIONED
        if not self.conditioned:
            self.allowed[torch.float32] = max(self.allowed[torch.float32], 10 * lost)
            self.allowed[torch.float64] = max(self.allowed[torch.float64], 10 * min(lost, 1.0) * _DIGITS)
        self._floor = 1e-5 if lost > 0.1 else 0.0

    def run(self, function: str, neighbours: bool = True) -> Outcome:
        """One function on this model; the neighbouring pairs are for strategies of the clipped sum."""
        try:
            error_64 = self._compare(function, self.double, self.truth)
            error_32 = self._compare(function, self.single, self.truth)
            pairs = self._other_batches(function) if neighbours and not self.program.wrong else 0
        except CaptureError as error:
            return Outcome(function, "refused", type(error).__name__, str(error))
        except BrokenPromiseError as error:
            return Outcome(function, "failed", error.kind, str(error))
        except Exception as error:  # no other error may come out
            return Outcome(function, "failed", type(error).__name__, str(error))
        kind = "equal" if self.program.wrong else "exact"
        return Outcome(function, kind, "", "", error_64, error_32, self.conditioned, pairs)

    def _compare(self, function: str, case: Case, truth: Truth | None) -> float:
        result = _call(function, case, self.bound)
        if truth is None:
            raise BrokenPromiseError("unnoticed", "not refused, though no per-example loss depends on a parameter")
        gradients = result if function == "gradients" else None
        norms = {"gradients": None, "norms": result}.get(function, getattr(result, "norms", None))
        worst = max(self._errors(truth, gradients, norms, getattr(result, "gradients", None)))
        dtype = case.inputs[-1].dtype
        if not worst <= self.allowed[dtype]:
            allowed, count = self.allowed[dtype], len(truth.norms)
            what = f"{dtype}, B = {count}: relative error {worst:.1e}, {allowed:.1e} allowed"
            raise BrokenPromiseError("inexact", what)
        return worst

    def _errors(
        self, truth: Truth, gradients: dict[str, Tensor] | None, norms: Tensor | None, summed: dict[str, Tensor] | None
    ) -> list[float]:
        """Relative errors of what is given."""
        size = max(float(truth.norms.norm()), self._floor) or 1.0
        added = max(float(truth.norms.clamp(max=self.bound).sum()), self._floor) or 1.0
        errors = [] if gradients is None else [_distance(gradients, truth.gradients) / size]
        errors += [] if norms is None else [float((norms.double() - truth.norms).norm()) / size]
        errors += [] if summed is None else [_distance(summed, truth.summed(self.bound)) / added]
        return [error if error == error else float("inf") for error in errors]  # max would pass over NaN

    # --- other batches of the same model -------------------------------------------------------------

    def _other_batches(self, function: str) -> int:
        """Another batch size is exact too; and removing an example moves the clipped sum by at most the bound."""
        if not self.program.removable:
            return 0
        other = self.program.batch % 5 + 1
        second = make_case(self.program, torch.float64, self._code, batch=other)
        second.model = self.double.model
        self._compare(function, second, Truth.of(second))
        if function not in STRATEGIES:
            return 0
        chosen = STRATEGIES.index(function) + len(self.program.source)
        for scale in (1.0, _EXTREMES[chosen % len(_EXTREMES)]):
            self._neighbours(function, chosen % self.program.batch, scale)
        return 2

    @cached_property
    def _evaluated(self) -> Case:
        """In eval mode: dropout would draw other masks for another batch size."""
        case = make_case(self.program, torch.float64, self._code)
        case.model.eval()
        return case

    def _neighbours(self, function: str, removed: int, scale: float) -> None:
        case = _with_extreme(self._evaluated, removed, scale)
        keep = [i for i in range(self.program.batch) if i != removed]
        result = _call(function, case, self.bound)
        without = _call(function, case, self.bound, keep).gradients if keep else {}
        moved = sum(float((g - without.get(n, 0)).square().sum()) for n, g in result.gradients.items()) ** 0.5
        if not moved <= self.bound * (1 + 1e-6):
            raise BrokenPromiseError(
                "moved",
                f"removing example {removed}, its numbers times {scale}, moved the clipped sum by "
                f"{moved / self.bound:.6g} bounds ({result.dropped} of {self.program.batch} dropped)",
            )


def _call(function: str, case: Case, bound: float, keep: list[int] | None = None) -> Any:
    loss_fn: Callable[[], Tensor] = case.loss_fn(keep)
    if function == "gradients":
        return dither.per_example_gradients(case.model, loss_fn)
    if function == "norms":
        return dither.per_example_norms(case.model, loss_fn)
    return dither.clipped_sum(case.model, loss_fn, max_grad_norm=bound, strategy=function)


def _distance(ours: dict[str, Tensor], truth: dict[str, Tensor]) -> float:
    """Norm of the difference over all parameters."""
    assert ours.keys() == truth.keys()
    return sum(float((ours[name].double() - truth[name].double()).square().sum()) for name in truth) ** 0.5


def _with_extreme(case: Case, example: int, scale: float) -> Case:
    """One example's numbers times a scale."""
    inputs = [x.clone() for x in case.inputs]
    for x in inputs:
        if x.is_floating_point():
            x[example] *= scale
    return Case(case.model, inputs, case.losses)


def check(program: Program, functions: Sequence[str] = FUNCTIONS, neighbours: bool = True) -> list[Outcome]:
    """Every function on one program."""
    checked = Check(program)
    return [checked.run(function, neighbours) for function in functions]
