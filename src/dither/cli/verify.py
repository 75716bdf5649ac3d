"""`dither verify`: is every example's gradient its own, for this model and this batch?"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jsonargparse import ActionConfigFile, ArgumentParser, Namespace

from dither.cli.parsing import Formatter, parse
from dither.errors import CaptureError, ConfigurationError

if TYPE_CHECKING:
    from dither.cli.subject import Subject
    from dither.clipping import VerificationReport

EXAMPLES = """
examples:
  dither verify model.py:make                    the function `make` in a file; takes nothing, returns what is below
  dither verify package.module:make --json       in a module that can be imported; for scripts
  dither verify runs/strict --examples 4         the model and loss of a run, on its own training images (not private)
  dither verify model.py:make --mode eval --strategy ghost

  def make():
      model = MyModel()
      batch = (torch.randn(8, 3, 32, 32), torch.randint(1000, (8,)))
      return model, batch, loss_fn               # loss_fn(model, batch) gives one loss per example, shape (8,)

Without a loss_fn, `return model, batch` calls model(*batch), or model(**batch) for a dict, and makes a loss of every
floating-point tensor in the output, each example's own entries on axis 0.

What is compared: each example's gradient with plain autograd's, of that example's loss alone; then the clipped sums.
Whether examples influence each other is looked for in the graph, and by exchanging the other examples.
Exit code 0: exact. 1: not exact, or refused, with the fix. 2: the request cannot work.
"""

REFUSED = 1


def verify_parser() -> ArgumentParser:
    """The parser of `dither verify`."""
    parser = ArgumentParser(
        prog="dither verify",
        usage="dither verify MODEL [options]",
        description="Check, before any training, that every example's gradient is exact and its own.",
        epilog=EXAMPLES,
        formatter_class=Formatter,
        exit_on_error=False,
    )
    parser.add_argument("model", type=str, help="file.py:factory, module:factory, or a run folder of `dither train`")
    parser.add_argument("--config", action=ActionConfigFile, help="a YAML file of these options; words after it win")
    parser.add_argument("--examples", type=int, default=8, help="compare the batch's first examples only; 0 for all")
    parser.add_argument(
        "--strategy",
        type=Literal["all", "auto", "hold", "ghost", "tile", "two_pass"],
        default="all",
        help="the way of forming clipped sums that is compared",
    )
    parser.add_argument(
        "--dtype",
        type=Literal["float64", "float32", "float16", "bfloat16", "keep"],
        default="float64",
        help="precision of model and batch; keep leaves them as they are",
    )
    parser.add_argument(
        "--mode", type=Literal["keep", "train", "eval"], default="keep", help="call model.train() or model.eval()"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the inputs that the factory draws; no noise is drawn")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser


def run(words: Sequence[str]) -> int:
    """Run `dither verify`; returns the exit code."""
    options = parse(verify_parser(), words)
    if options.examples < 0 or options.examples == 1:
        raise ConfigurationError(
            f"--examples {options.examples} cannot show whether examples influence each other",
            fix="2 or more, or 0 for the whole batch",
        )
    from dither.cli.subject import cut, exchange

    subject = _subject(options)
    with _default_dtype(options.dtype):
        about = {"model": options.model, **_about(subject)}
        try:
            subject, about["batch"] = cut(subject, options.examples)
            about["loss"] = getattr(subject.loss_fn, "words", "") or "as given"
            report = _verify(subject, options.strategy)
            about["exchange"] = exchange(subject)
        except CaptureError as error:
            _print_refusal(about, error, options.json)
            return REFUSED
    _print_report(about, report, options.json)
    return 0 if report.exact and report.independent and report.tested else REFUSED


def _subject(options: Namespace) -> Subject:
    """Model, batch and loss, in the wanted precision and mode."""
    import random

    import numpy as np
    import torch

    from dither.cli.factory import from_factory, from_run

    torch.manual_seed(options.seed)
    random.seed(options.seed)
    np.random.seed(options.seed % 2**32)
    path = Path(options.model)
    subject = from_run(path, options.examples) if path.is_dir() else from_factory(options.model)
    if options.dtype != "keep":
        subject = subject.cast(getattr(torch, options.dtype))
    if options.mode != "keep":
        subject.model.train(options.mode == "train")
    return subject


@contextmanager
def _default_dtype(name: str) -> Iterator[None]:
    """Tensors that the model makes itself have the wanted precision too."""
    import torch

    before = torch.get_default_dtype()
    torch.set_default_dtype(before if name == "keep" else getattr(torch, name))
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _verify(subject: Subject, strategy: str) -> VerificationReport:
    from dither.clipping.plan import STRATEGIES
    from dither.clipping.verify import verify

    chosen = STRATEGIES if strategy == "all" else (strategy,)
    return verify(subject.model, lambda: subject.loss_fn(subject.model, subject.batch), chosen)


def _about(subject: Subject) -> dict[str, Any]:
    model = subject.model
    modes = {module.training for module in model.modules()}
    dtypes = {str(p.dtype).removeprefix("torch.") for p in model.parameters()}
    return {
        "class": type(model).__name__,
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "mode": "mixed" if len(modes) > 1 else "train" if modes.pop() else "eval",
        "dtype": ", ".join(sorted(dtypes)),
    }


def _print_about(about: dict[str, Any]) -> None:
    print(
        f"{about['model']}: {about['class']}, {about['trainable_parameters']:,} trainable parameters, "
        f"{about['dtype']}, {about['mode']} mode"
    )
    for name in ("batch", "loss", "exchange"):
        if name in about:
            print(f"{name}: {about[name]}")


def _print_refusal(about: dict[str, Any], error: CaptureError, as_json: bool) -> None:
    if as_json:
        said = {"verdict": "refused", "exact": False, "error": type(error).__name__, "what": error.what}
        print(json.dumps({**about, **said, "fix": error.fix}, indent=2))
        return
    _print_about(about)
    print(f"refused: {error.what}\n  Fix: {error.fix}")


def _print_report(about: dict[str, Any], report: VerificationReport, as_json: bool) -> None:
    if as_json:
        print(json.dumps({**about, **_as_json(report)}, indent=2))
        return
    _print_about(about)
    print(report)


def _as_json(report: VerificationReport) -> dict[str, Any]:
    def number(error: float) -> float | str:
        return error if math.isfinite(error) else str(error)  # JSON knows no infinity

    def status(name: str) -> str:
        return "unused" if name in report.unused else "zero" if name in report.zero else "compared"

    parameters = [
        {
            "name": name,
            "shape": report.shapes[name],
            "status": status(name),
            "error": number(error),
            "uses": [
                {
                    "operation": use.operation,
                    "axis": None if use.axis is None else use.axis.axis,
                    "rows_per_example": use.rows_per_example,
                    "layout": use.layout,
                    "strategy": use.strategy,
                }
                for use in report.uses_of(name)
            ],
        }
        for name, error in report.errors.items()
    ]
    return {
        "verdict": report.verdict,
        "exact": report.exact,
        "examples": report.examples,
        "not_finite": report.not_finite,
        "independent": report.independent,
        "repeats": report.repeats,
        "max_relative_error": number(report.max_relative_error),
        "tolerance": report.tolerance,
        "strategies": {name: number(error) for name, error in report.strategies.items()},
        "remarks": report.remarks,
        "parameters": parameters,
    }
