"""The page docs/opacus-limits.md: written from measured outcomes, and read back by the tests."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from limits_measure import DITHER, MODES, OPACUS, Outcome, outcome

import dither
from dither import errors
from dither.errors import DitherError

PAGE = Path(__file__).parent.parent.parent / "docs" / "opacus-limits.md"

_INTRODUCTION = """# Opacus's limits, and ours

Each row is a small model, its inputs and its loss, in `tests/opacus/limits.py`, and a test in
`tests/opacus/test_limits.py`. The page is the output of `python tests/opacus/limits.py`. Measured on 2026-11-24:
Opacus {opacus}, torch {torch}, dither {dither}; CPU, float64, batches of 4 (except where the row says otherwise),
clipping norm C = 1, loss reduction "mean".

Opacus's classes are used as they are, without `dither.opacus.install()`. "Hooks" is `GradSampleModule` with
`DPOptimizer`; "ghost" is `GradSampleModuleFastGradientClipping`, `DPOptimizerFastGradientClipping` and
`DPLossFastGradientClipping`. dither's column is its classes of the same names; where both modes agree, the outcome is
given once.

- **exact**: the clipped sum that the optimizer adds noise to, and in hooks mode each example's gradient, agree with
  plain autograd on one example at a time to a relative 1e-10.
- **silent, 157% off**: no error, and the difference is that large, relative to the truth.
- **silent, 3×C**: no error, and leaving one example out moves the clipped sum by 3 C. Above 1 the noise is too small
  for the privacy that is claimed. The figures are those of the row's own small model and numbers.
- **error**, **refused**: an exception; refused if it is one of dither's named errors, which say what to do.

| Case | Opacus hooks | Opacus ghost | dither |
|---|---|---|---|
"""


def table(limits: Sequence[Any]) -> str:
    """Measure every row; the whole page."""
    import opacus

    versions = {"opacus": opacus.__version__, "torch": torch.__version__.split("+")[0], "dither": dither.__version__}
    torch.set_num_threads(1)
    lines = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for limit in limits:
            stock = [outcome(OPACUS, mode, limit.make).words for mode in MODES]
            ours = [outcome(DITHER, mode, limit.make).words for mode in MODES]
            joined = ours[0] if ours[0] == ours[1] else f"hooks: {ours[0]}; ghost: {ours[1]}"
            lines.append(f"| {limit.name} | {stock[0]} | {stock[1]} | {joined} |\n")
    return _INTRODUCTION.format(**versions) + "".join(lines)


def category(words: str) -> str:
    """The category that a cell of the table stands for."""
    if words == "exact":
        return words
    if words.startswith("silent, "):
        return "silently wrong"
    found = re.fullmatch(r"(?:error|refused): `(\w+)`", words)
    if found is None:
        raise ValueError(f"A cell says {words!r}.")
    return f"error: {found[1]}"


def rows() -> list[tuple[str, tuple[str, str], tuple[str, str]]]:
    """The committed page's rows: name, Opacus's two categories, dither's two categories."""
    found = []
    for line in PAGE.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("| ") or cells[0] == "Case":
            continue
        name, hooks, ghost, ours = cells
        both = re.fullmatch(r"hooks: (.*); ghost: (.*)", ours)
        mine = (both[1], both[2]) if both else (ours, ours)
        found.append((name, (category(hooks), category(ghost)), (category(mine[0]), category(mine[1]))))
    return found


def fulfils(found: str, expected: str) -> bool:
    """Whether a category is the expected one; "exact or a named error" takes any of dither's errors."""
    if expected != "exact or a named error":
        return found == expected
    kind = getattr(errors, found.removeprefix("error: "), None)
    return found == "exact" or (isinstance(kind, type) and issubclass(kind, DitherError))


__all__ = ["PAGE", "Outcome", "category", "fulfils", "rows", "table"]
