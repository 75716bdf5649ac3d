"""The `dither` command: finds the subcommand, and turns errors into messages and exit codes.

Exit codes: 0 done; 1 `dither verify` refused, or found a model not exact, or `dither bench` one that became slower, or
`dither certificate check` a claim that does not hold; 2 something in the request cannot work (message and fix on
stderr); 130 interrupted, resumable; 141 whoever read the output left (`| head`).
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

COMMANDS = {
    "train": "train an image generator privately; with no arguments, on digits, in about three minutes",
    "encode": "turn images into latents of a public autoencoder, to train on",
    "sample": "draw images of a class from a trained run",
    "evaluate": "score generated images against real ones",
    "export": "a run's DiT for diffusers, or as facebookresearch/DiT writes it",
    "budget": "epsilon from noise, noise from epsilon, steps from both",
    "verify": "is every example's gradient exact and its own, for this model and batch?",
    "report": "a run on one HTML page: claim, ledger, curves, samples, warnings",
    "certificate": "check a certificate: its form, and epsilon computed again from its ledger",
    "bench": "what privacy costs in time and memory, beside plain training and other libraries",
}
"""By name, one line of help; the command lives in `dither.cli.<name>`, imported only when it is asked for."""

COMPUTING = ("train", "encode", "sample", "evaluate")
"""Commands that run models for long; the processes of `dither bench` see to it themselves."""

USAGE = """usage: dither COMMAND [options]

Train PyTorch models under differential privacy.

commands:
{commands}

Start here:
  dither train                                          a run folder under runs/, samples.png inside
  dither sample runs/digits-... --label 3 --count 16    more images of one class
  dither budget --dataset_size 60000 --batch_size 1024 --steps 5000 --epsilon 8 --delta 1e-5
  dither verify model.py:make                           a model of yours, before you train it privately

`dither COMMAND --help` explains each option. `--debug` shows tracebacks. `dither --version` prints the version.
"""


def usage() -> str:
    """The text of `dither --help`."""
    return USAGE.format(commands="\n".join(f"  {name:11} {line}" for name, line in COMMANDS.items()))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: the words after `dither`; those of the process if not given.

    Returns:
        The exit code.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage(), end="")
        return 0
    if words[0] in ("-V", "--version"):
        from dither import __version__

        print(f"dither {__version__}")
        return 0
    if words[0] not in COMMANDS:
        return _complain(f"there is no command {words[0]!r}", f"use one of: {', '.join(COMMANDS)}; see dither --help")
    if arguments is None and words[0] in COMPUTING:  # the process is the command's own
        from dither.allocator import keep_memory

        keep_memory()
    return _run(words[0], words[1:], debug)


def _run(command: str, words: list[str], debug: bool) -> int:
    from dither.errors import DitherError

    try:
        try:
            return int(importlib.import_module(f"dither.cli.{command}").run(words))
        finally:
            sys.stdout.flush()
    except DitherError as error:
        if debug:
            raise
        return _complain(error.what, error.fix)
    except ModuleNotFoundError as error:
        if debug or (error.name or "").startswith("dither"):
            raise
        missing = error.name
        return _complain(
            f"the package {missing} is not installed", f"pip install {missing}, or pip install 'dither[cli]'"
        )
    except OSError as error:
        if isinstance(error, BrokenPipeError) and command != "train":
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing is flushed into it at exit
            return 141
        if debug:
            raise
        return _complain(
            f"the system refuses: {error}",
            "see that the disk has room and the folder may be written; a run goes on from its last save with "
            "dither train --resume RUN",
        )
    except KeyboardInterrupt:
        if debug:
            raise
        print("Interrupted.", file=sys.stderr)
        return 130


def _complain(what: str, fix: str) -> int:
    print(f"dither: {what}\n  Fix: {fix}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    raise SystemExit(main())
