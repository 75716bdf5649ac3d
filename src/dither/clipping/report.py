"""What a verification found, as values and in words."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from dither.capture.examples import Layout, Ragged
from dither.clipping.plan import PlannedUse


@dataclass(frozen=True, kw_only=True)
class VerifiedUse(PlannedUse):
    """One use, and where the examples lie in it.

    Attributes:
        parameters: the names of the parameters behind the use; several if it takes a tensor computed from them.
        output_shape: shape of the operation's output.
        axis: where the examples lie in the output; None if no loss reaches it.
    """

    parameters: tuple[str, ...]
    output_shape: tuple[int, ...]
    axis: Layout | None

    @property
    def rows_per_example(self) -> int | None:
        """How many entries of the example axis belong to one example; at most, where they are ragged."""
        return None if self.axis is None else self.axis.outer * self.axis.inner

    @property
    def layout(self) -> str:
        """Where the examples lie, in words."""
        axis = self.axis
        if axis is None:
            return "no loss reaches it"
        if axis.batch == 1:
            return "the only example"
        if isinstance(axis, Ragged):
            return f"axis {axis.axis}, up to {axis.inner} rows an example, in no regular order"
        rows = axis.outer * axis.inner
        if rows == 1:
            return f"axis {axis.axis}, 1 row an example"
        if axis.outer == 1:
            return f"axis {axis.axis}, {rows} rows in a run an example"
        if axis.inner == 1:
            return f"axis {axis.axis}, {rows} rows an example, {axis.batch} apart"
        return f"axis {axis.axis}, {rows} rows an example, in {axis.outer} runs of {axis.inner}"


@dataclass(frozen=True)
class VerificationReport:
    """What the comparison found; print it to read it.

    Attributes:
        exact: whether every error is within the tolerance, and the loss repeated itself.
        max_relative_error: the largest error over parameters and strategies.
        errors: by parameter name, the error of the per-example gradients relative to the oracle's norm over all
            examples. Where it is above the tolerance, but not above four rounding units of the whole gradient (a
            gradient that cancels to zero), it is relative to the whole gradient.
        uses: every recorded use, with the strategy "auto" takes for it and where the examples lie.
        examples: number of examples compared.
        tolerance: 1e-8 in float64, 1e-4 in float32, else 5e-2; of the coarsest parameter.
        independent: whether it was proved that no example's loss depends on another example. A dependence that is found
            raises; so False means that there was only one example.
        strategies: by strategy, the error of `clipped_sum`: of its sums likewise, of its norms, of what it dropped.
        shapes: by parameter name, its shape.
        unused: parameters that no example's loss reaches.
        zero: parameters that are reached, with a gradient of zero in every example: little was tested there.
        not_finite: number of examples whose gradient is not finite; they are dropped by clipping, and not compared.
        repeats: whether the loss gave the same values when called again from the same random state.
    """

    exact: bool
    max_relative_error: float
    errors: dict[str, float]
    uses: tuple[VerifiedUse, ...]
    examples: int
    tolerance: float = math.nan
    independent: bool = False
    strategies: dict[str, float] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    unused: tuple[str, ...] = ()
    zero: tuple[str, ...] = ()
    not_finite: int = 0
    repeats: bool = True

    @property
    def tested(self) -> bool:
        """Whether some parameter has a gradient other than zero: without one, exact says nothing."""
        return len(self.unused) + len(self.zero) < len(self.errors)

    @property
    def verdict(self) -> str:
        """One sentence: whether a private run may be trusted with this model and loss."""
        if self.exact and not self.tested:
            return "nothing was tested: no parameter has a gradient other than zero in this batch"
        if self.exact and self.independent:
            return "exact: every example's gradient is its own; safe to train privately"
        if self.exact:
            return "exact, but on one example, which says nothing of whether examples influence each other"
        if not self.repeats:
            return (
                "NOT exact: called again from the same random state, the loss gave other values, so nothing can be "
                "compared. It draws randomness of its own (a torch.Generator, a numpy Generator, the clock) or "
                "remembers the call before; let it draw from the global state of torch, numpy or random"
            )
        if not self.examples:
            return "NOT exact: no example has a finite gradient, so nothing could be compared"
        wrong = {**{f"parameter {n}": e for n, e in self.errors.items()}, **self._sums()}
        wrong = {name: error for name, error in wrong.items() if not error <= self.tolerance}
        return "NOT exact: do not train privately with it, and report it to dither; off are " + ", ".join(
            f"{name} by {error:.1e}" for name, error in wrong.items()
        )

    @property
    def remarks(self) -> tuple[str, ...]:
        """What else should be known before the verdict is relied on."""
        found = []
        if self.not_finite:
            found.append(f"{self.not_finite} more examples have a gradient that is not finite: clipping drops them")
        if self.zero:
            found.append(
                f"{len(self.zero)} of {len(self.errors)} parameters have a zero gradient in every example, so little "
                "was tested there: gates that start closed open after some steps of training; verify again then"
            )
        return tuple(found)

    def uses_of(self, name: str) -> tuple[VerifiedUse, ...]:
        """The recorded uses of a parameter, also through tensors computed from it."""
        return tuple(use for use in self.uses if name in use.parameters)

    def __str__(self) -> str:
        """The verdict, what was compared, and a table of the parameters and their uses."""
        influence = (
            "no example influences another" if self.independent else "whether examples influence each other: not tested"
        )
        lines = [
            self.verdict,
            f"  largest relative error {self.max_relative_error:.1e} over {self.examples} examples, one at a time "
            f"(tolerance {self.tolerance:.0e})",
            f"  {influence}",
        ]
        if self.strategies:
            lines.append("  clipped sums: " + ", ".join(f"{s} {_number(e)}" for s, e in self.strategies.items()))
        lines += [f"  {remark}" for remark in self.remarks]
        return "\n".join([*lines, "", *_table(self._rows())])

    def _sums(self) -> dict[str, float]:
        return {f"the clipped sum of strategy {name}": error for name, error in self.strategies.items()}

    def _rows(self) -> Iterable[Sequence[str]]:
        yield "parameter", "shape", "error", "used by", "where the examples lie", "strategy"
        for name, error in self.errors.items():
            uses = self.uses_of(name)
            said = "zero" if name in self.zero else _number(error)
            first = (name, "x".join(map(str, self.shapes.get(name, ()))) or "scalar")
            if name in self.unused:
                yield (*first, "-", "unused in this batch", "", "")
                continue
            for number, use in enumerate(uses):
                lead = (*first, said) if number == 0 else ("", "", "")
                yield (*lead, use.operation, use.layout, use.strategy)


def _number(error: float) -> str:
    return f"{error:.1e}" if error else "0"


def _table(rows: Iterable[Sequence[str]]) -> list[str]:
    """Left-aligned columns."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
