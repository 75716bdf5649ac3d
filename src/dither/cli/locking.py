"""One process at a time where two would spend a budget twice.

Each holds a lock on a file, which the system lifts when the process ends, however it ends. Where the system or the file
system has no locks nothing is held: there it is for the user to see that no two processes do the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

from dither.errors import FolderInUseError, OutputPathError
from dither.files import held


def training_alone(run: Path) -> AbstractContextManager[None]:
    """Keep other processes from training this run: two would take the same steps twice, and mix their states.

    Raises:
        FolderInUseError: another process trains it.
        OutputPathError: its run.json, which is held, cannot be written.
    """
    fix = "wait until it ends, or stop it with Ctrl-C there: it saves its state, and --resume goes on from that"
    return _alone(run / "run.json", f"another process trains {run}", fix)


def evaluating_alone(output: Path) -> AbstractContextManager[None]:
    """Keep other processes from evaluating into this folder: of two private scores one would be forgotten.

    Raises:
        FolderInUseError: another process does.
        OutputPathError: the folder cannot be written.
    """
    fix = "wait until it ends; its private score, if any, counts for the next one"
    return _alone(output / "evaluation.lock", f"another process evaluates into {output}", fix)


@contextmanager
def _alone(file: Path, what: str, fix: str) -> Iterator[None]:
    with ExitStack() as lock:
        try:
            lock.enter_context(held(file))
        except BlockingIOError as error:
            raise FolderInUseError(f"{what}: it holds {file.name}", fix=fix) from error
        except OSError as error:
            raise OutputPathError(
                f"{file} cannot be written: {error.strerror}", fix="see that you may write to its folder"
            ) from error
        yield
