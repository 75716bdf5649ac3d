"""Results as Markdown: tables for the terminal, and the page docs/performance.md."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

from dither.benchmark.contenders import CONTENDERS
from dither.benchmark.results import JAX_PLAIN, JAX_PRIVATE, Explained, Growth, Results, Row, Spread

TITLES = {name: known.title for name, known in CONTENDERS.items()} | {JAX_PRIVATE: "jax-privacy"}
WRONG = 1e-3
"""Relative distance of a clipped sum in float32 from dither's, above which the cell says so."""

_LONGEST = 90

_PROTOCOL = """\
One step is a logical batch of {microbatches} micro-batches, with the optimizer (fused AdamW) and, where it is private,
Gaussian noise once. All contenders have the same model, weights and data; they run in one process, in turns, {pairs}
rounds after {warm_up} warm-up steps. A ratio is of a step to the plain step of the same round: the median over rounds,
in brackets the least and the largest. jax-privacy is divided by plain JAX on a DiT of the same sizes, compiled. Batch
is the micro-batch's. dither proves its gradients in micro-batches 1, 2, 4, 8, 16, 32, ...: those that fall into the
rounds are measured with the rest."""

_MEMORY = """\
Peak of resident memory in the third step, here of two micro-batches, each contender in a process of its own, less what
was resident when only code, model and data were there; over the plain step's. In torch's processes, timed
or weighed, the C allocator keeps freed memory within a step (`dither.keep_memory`), as in dither's own commands."""

_PROCESS = """\
The same peaks with all that the process holds, libraries and model included: what a machine has to have."""

_FIRST = """\
The first step over a later plain step. dither proves its gradients in it; JAX compiles."""

_GROWTH = """\
Step time of a DiT along one size, all sizes and both steps in turns in one process; exponents by least squares in
logarithms."""

_EXPLAINED = """\
What the plan expects of each use in a micro-batch, and what forming, taking norms and summing took: milliseconds."""


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """An aligned Markdown table; the first column to the left, the others to the right."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    first, *others = widths
    shown = [[r[0].ljust(first), *(c.rjust(w) for c, w in zip(r[1:], others, strict=True))] for r in cells]
    lines = [f"| {' | '.join(row)} |" for row in shown]
    rule = f"|-{'-' * first}-|" + "".join(f"{'-' * (w + 1)}:|" for w in others)
    return "\n".join([lines[0], rule, *lines[1:]])


def spread(found: Spread | None) -> str:
    """A ratio as a cell: 1.05 (1.02 to 1.11)."""
    return "" if found is None else f"{found.median:.2f} ({found.low:.2f} to {found.high:.2f})"


def _ratio(found: float | None) -> str:
    return "" if found is None else f"{found:.2f}"


def _shown(row: Row, name: str, value: str) -> str:
    """A cell: the error's first line where there is one, and a remark where the sum is another."""
    cell = row.cells.get(name)
    error = cell.error if cell is not None else None
    if error is None and cell is not None and (plain := row.baseline(name)) is not None and plain.error is not None:
        error = f"plain: {plain.error}"
    if error is not None:
        return error if len(error) <= _LONGEST else error[:_LONGEST].rstrip() + "..."
    apart = cell.distance if cell is not None else None
    return f"{value}, sum off by {apart:.0e}" if value and apart is not None and not apart <= WRONG else value


def grid(rows: Sequence[Row], value: Callable[[Row, str], str]) -> str:
    """Contenders down, models across."""
    names = [n for n in TITLES if n != "plain" and any(n in row.cells for row in rows)]
    header = ["over plain", *(row.model for row in rows)]
    return markdown(header, [[TITLES[n], *(_shown(row, n, value(row, n)) for row in rows)] for n in names])


def plain_table(rows: Sequence[Row]) -> str:
    """What the ratios are of: sizes, the plain step's time and memory."""

    def words(row: Row, name: str) -> list[str]:
        cell = row.cells.get(name)
        seconds = f"{statistics.median(cell.seconds):.3f} s" if cell is not None and cell.seconds else ""
        memory = f"{cell.peak_mib:.0f} MiB" if cell is not None and cell.peak_mib is not None else ""
        return [seconds, memory]

    with_jax = any(JAX_PLAIN in row.cells for row in rows)
    header = ["model", "sizes", "plain step", "peak", *(["plain JAX step", "peak"] if with_jax else [])]
    return markdown(
        header, [[r.model, r.sizes, *words(r, "plain"), *(words(r, JAX_PLAIN) if with_jax else [])] for r in rows]
    )


def time_table(rows: Sequence[Row]) -> str:
    """Ratios of step time."""
    return grid(rows, lambda row, name: spread(row.time(name)))


def memory_table(rows: Sequence[Row]) -> str:
    """Ratios of peak memory; nothing if it was not measured."""
    if not any(row.memory(name) is not None for row in rows for name in row.cells):
        return ""
    return grid(rows, lambda row, name: _ratio(row.memory(name)))


def process_table(rows: Sequence[Row]) -> str:
    """Ratios of the whole process's peak memory; nothing if it was not measured."""
    if not any(row.process(name) is not None for row in rows for name in row.cells):
        return ""
    return grid(rows, lambda row, name: _ratio(row.process(name)))


def first_table(rows: Sequence[Row]) -> str:
    """Ratios of the first step."""
    return grid(rows, lambda row, name: _ratio(row.first(name)))


def growth_table(found: Growth) -> str:
    """Times and ratio of each value; the last row has the exponents."""
    columns = zip(found.values, found.seconds["plain"], found.seconds["auto"], found.ratios(), strict=True)
    rows = [
        [str(v), f"{statistics.median(plain):.3f} s", f"{statistics.median(ours):.3f} s", spread(ratio)]
        for v, plain, ours, ratio in columns
    ]
    rows.append(["exponent", f"{found.exponents['plain']:.2f}", f"{found.exponents['auto']:.2f}", ""])
    return markdown([found.axis, "plain", "dither auto", "ratio"], rows)


def explained_table(uses: Sequence[Explained]) -> str:
    """A use each, the dearest first, and their sum."""
    ordered = sorted(uses, key=lambda use: -use.measured)
    predicted = [use.predicted for use in uses if use.predicted is not None]
    whole = Explained(
        "all uses",
        "",
        "",
        sum(use.held_bytes for use in uses),
        sum(predicted) if len(predicted) == len(uses) else None,
        sum(use.measured for use in uses),
    )
    return markdown(
        ["parameter", "operation", "strategy", "held MiB", "predicted", "measured", "measured / predicted"],
        [_explained(use) for use in [*ordered, whole]],
    )


def _explained(use: Explained) -> list[str]:
    said = "" if use.predicted is None else f"{use.predicted * 1e3:.3f}"
    times = "" if not use.predicted else f"{use.measured / use.predicted:.2f}"
    held = f"{use.held_bytes / 2**20:.2f}"
    return [use.parameter, use.operation, use.strategy, held, said, f"{use.measured * 1e3:.3f}", times]


def sections(results: Results) -> list[tuple[str, str, str]]:
    """Title, words and table of every part that was measured."""
    about, rows = results.about, results.rows
    parts = [
        ("Plain steps", "What the ratios below are of.", plain_table(rows)),
        ("Step time over the plain step", _PROTOCOL.format(**about["settings"]), time_table(rows)),
        ("Peak memory over the plain step", _MEMORY, memory_table(rows)),
        ("Peak memory of the whole process over the plain step's", _PROCESS, process_table(rows)),
        ("First step", _FIRST, first_table(rows)),
    ]
    found = [part for part in parts if rows and part[2]]
    for number, one in enumerate(results.growth):
        title = f"Growth with {one.axis}"
        found.append((title, f"{_GROWTH if number == 0 else ''}\nThe others: {one.base}.".strip(), growth_table(one)))
    for number, (model, uses) in enumerate(results.explained.items()):
        found.append((f"The plan of {model}", _EXPLAINED if number == 0 else "", explained_table(uses)))
    return found


def origin(results: Results) -> str:
    """Machine, versions, date."""
    about = results.about
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    smoke = "\n\n**Tiny sizes, to see that everything runs: no figure here means anything.**" if about["smoke"] else ""
    compiled = " Blocks of the plain step and of dither's are compiled (`--compile`)." if about.get("compile") else ""
    return f"Measured on {about['date']}: {about['machine']}; threads: {about['threads']}. {versions}.{compiled}{smoke}"


def page(results: Results, command: str, picture: str | None) -> str:
    """The page.

    Args:
        results: of a run.
        command: that repeats it.
        picture: path of the picture, relative to the page; None for none.
    """
    parts = [
        "# Performance",
        f"Written by `{command}`; do not edit. Quote the ratios: lone times say more of the machine than of the code.",
        origin(results),
    ]
    if picture is not None:
        parts.append(f"![Step time and peak memory over the plain step]({picture})")
    for title, words, found in sections(results):
        parts += [f"## {title}", *([words] if words else []), found]
    if results.failed:
        parts += ["## Not measured", "\n".join(f"- {said}" for said in results.failed)]
    return "\n\n".join(parts) + "\n"
