"""The page docs/models.md: `python tests/zoo/table.py > docs/models.md`; `--only NAME` measures and prints one row."""

from __future__ import annotations

import argparse
import datetime
import sys
import warnings
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

sys.path.insert(1, str(Path(__file__).parent.parent))

import torch
from findings import finding
from registry import MODULES, load

import dither
from zoo import BOUND, B, Entry, Measured, measure

PAGE = Path(__file__).parent.parent.parent / "docs" / "models.md"

_INTRODUCTION = """# Models

Public architectures, built from config with small random weights and unmodified (where batch norm had to go, the row
says so), each with a loss per example. Each row is an entry of a registry in `tests/zoo`; the page is the output of
`python tests/zoo/table.py`, and `--only NAME` measures one row.

Measured on {date}: {versions}.
CPU, float64, batches of {batch}, train mode, small noise on every parameter first so that no zero hides a gradient.

The reference is plain autograd, one example's loss at a time, through a second forward from the same random states: it
sees the same masks. The relative error is the largest of three: per-example gradients, and the clipped sum with
strategies `auto` and `ghost`, the clipping norm being the median gradient norm. It is the norm of the difference over
all parameters, relative to the reference's norm. "Random" says whether the forward drew random numbers (dropout, drop
path, label drop, posteriors).

- **exact**: at most {bound:.0e}.
- **within float32's rounding**: above that, because the model computes in float32 itself; the row names the bound.
- **refused**: one of dither's named errors; **rightly**, where no per-example gradient exists (a loss over the batch).
- **not exact**, **not refused** where no per-example gradient exists, **fails** with any other error: defects,
  to be mended.

Where a model computes parts in float32 whatever its dtype is, rounding is what is left of the error. Such rows name,
as "reference's own", by how much the reference differs from itself when every loss is multiplied by 3 and its gradient
divided by 3. "Unused" are parameter tensors that this loss does not reach.

{summary}

| Library | Model | Inputs | Trainable parameters | Uses | Random | Relative error | Verdict |
|---|---|---|---:|---:|---|---:|---|
"""


def verdict(chosen: Entry, found: Measured) -> str:
    """One of the words that the page explains."""
    if found.refusal:
        return "refused, rightly" if found.is_refused_as(chosen) else "refused"
    if found.failure is not None:
        return "fails"
    if chosen.refused is not None:
        return "not refused"
    if found.error <= BOUND:
        return "exact"
    return "within float32's rounding" if found.error <= chosen.bound else "not exact"


def row(chosen: Entry, found: Measured) -> str:
    """A line of the table."""
    said = verdict(chosen, found)
    remarks = [chosen.note] if chosen.note else []
    error = "" if found.failure else f"{found.error:.1e}"
    if found.failure is not None:
        said += f": `{type(found.failure).__name__}`"
        remarks.append(_reason(found.failure))
    elif chosen.bound != BOUND:
        remarks.append(f"bound {chosen.bound:.0e}")
    if found.own_error is not None:
        remarks.append(f"reference's own {found.own_error:.1e}")
    if finding(chosen) and said != "exact":
        remarks.append(f"to be mended ({finding(chosen)})")
    if found.unreached:
        remarks.append(f"{found.unreached} of {found.tensors} tensors unused")
    cell = "; ".join([said, *remarks])
    counts = f"{found.parameters:,} | {found.uses or ''} | {'yes' if found.random else ''}"
    return f"| {chosen.library} | {chosen.name} | {chosen.inputs} | {counts} | {error} | {cell} |"


def _reason(failure: Exception) -> str:
    """The first sentence of what was raised, fit for a cell."""
    words = getattr(failure, "what", str(failure)).split("\n")[0].replace("|", "\\|")
    return words if len(words) <= 200 else words[:200].rstrip() + "..."


def rows_of(page: str) -> list[tuple[str, str]]:
    """Library and model of every row of a page."""
    cells = [[cell.strip() for cell in line.split("|")] for line in page.splitlines() if line.startswith("| ")]
    return [(c[1], c[2]) for c in cells if c[1] != "Library"]


def select(entries: Sequence[Entry], name: str) -> list[Entry]:
    """The entries of that name; otherwise those whose library and name contain it."""
    exact = [e for e in entries if e.name == name]
    return exact or [e for e in entries if name.lower() in f"{e.library} {e.name}".lower()]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", metavar="NAME", help="measure and print the rows of this name")
    only = parser.parse_args().only
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    entries, missing = load()
    if missing and not only:
        sys.exit(f"The page needs every library; missing: {missing}")
    chosen = select(entries, only) if only else entries
    if not chosen:
        sys.exit(f"No model is called {only!r}.")
    lines, verdicts = [], Counter[str]()
    for e in chosen:
        found = measure(e)
        lines.append(row(e, found))
        verdicts[verdict(e, found)] += 1
        print(lines[-1], file=sys.stdout if only else sys.stderr, flush=True)
    if not only:
        print(_introduction(verdicts) + "\n".join(lines))


def _introduction(verdicts: Counter[str]) -> str:
    names = ["torch", *MODULES]
    versions = ", ".join(f"{name} {version(name).split('+')[0]}" for name in names) + f", dither {dither.__version__}"
    summary = (
        f"{sum(verdicts.values())} models: " + ", ".join(f"{n} {said}" for said, n in verdicts.most_common()) + "."
    )
    return _INTRODUCTION.format(
        date=datetime.date.today().isoformat(), versions=versions, batch=B, bound=BOUND, summary=summary
    )


if __name__ == "__main__":
    main()
