"""`dither report`: a run on one page, for whoever answers for privacy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser
from rich.console import Console

from dither.cli.parsing import Formatter, parse

EXAMPLES = """
examples:
  dither report runs/digits-20250101-120000           report.html in the run folder, all there is
  dither report runs/strict --public                  report-public.html: only what the guarantee covers
  dither report runs/strict --output strict.html

The page is one file without scripts, and asks the network for nothing. `dither train` writes it at its end; write it
again after `dither evaluate`. Without --public it holds values that are not private, and is not to be published.
"""


def report_parser() -> ArgumentParser:
    """The parser of `dither report`."""
    parser = ArgumentParser(
        prog="dither report",
        usage="dither report RUN [options]",
        description="Write a run's privacy report: claim, ledger, curves, samples, cost, evaluation, warnings.",
        epilog=EXAMPLES,
        formatter_class=Formatter,
        exit_on_error=False,
    )
    parser.add_argument("run", type=Path, help="the folder that `dither train` wrote, finished or not")
    parser.add_argument("--output", type=Path | None, default=None, help="the page; by default in the run folder")
    parser.add_argument("--public", action="store_true", help="leave out what the guarantee does not cover")
    return parser


def run(words: Sequence[str]) -> int:
    """Run `dither report`; returns the exit code."""
    options = parse(report_parser(), words)
    from dither.report import write_report

    file = write_report(options.run, options.output, public=options.public)
    console = Console(markup=False, highlight=False)
    console.print(f"Report {file}", soft_wrap=True)
    if not options.public:
        console.print("It holds values that are not private; --public leaves them out.")
    return 0
