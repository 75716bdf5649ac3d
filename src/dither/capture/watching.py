"""What no torch function shows: custom autograd functions, reentrant checkpoints, compiled code.

While anybody records, `torch.autograd.Function.apply` asks the calling thread's recorder. A reentrant checkpoint hides
its operations in a graph of its own, so it runs as the other kind, which has the same result (torch.utils.checkpoint).
Compiled code would hide its operations too, so it runs as it was written; all but what `dither.compile` compiled.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import torch.utils.checkpoint
from torch import Tensor
from torch.autograd import Function
from torch.utils.checkpoint import CheckpointFunction

from dither.errors import NestedRecorderError


class Watcher(Protocol):
    """A recorder."""

    def applied(self, function: Any, arguments: Any, output: Any) -> None:
        """Take note of what a custom autograd function returned."""

    def declare(self, tensor: Tensor, declared: Any) -> None:
        """Take note of what is said of a tensor."""


_local = threading.local()
_lock = threading.Lock()
_watchers = 0
_original: Any = None
_readers = 0
_stance: Any = None


def begin(watcher: Watcher) -> None:
    """Watch what this thread does.

    Raises:
        NestedRecorderError: somebody does already.
    """
    global _watchers, _original
    if getattr(_local, "watcher", None) is not None:
        raise NestedRecorderError(
            "A dither recording was started inside another one.",
            fix="call clipped_sum, per_example_gradients or verify outside the loss function",
        )
    _local.watcher = watcher
    with _lock:
        _watchers += 1
        if _watchers == 1:
            _original = vars(Function)["apply"]
            setattr(Function, "apply", classmethod(_apply))  # noqa: B010


def end() -> None:
    """Watch no longer."""
    global _watchers
    _local.watcher = None
    with _lock:
        _watchers -= 1
        if _watchers == 0:
            setattr(Function, "apply", _original)  # noqa: B010


def current() -> Watcher | None:
    """This thread's recorder, while it records."""
    watcher: Watcher | None = getattr(_local, "watcher", None)
    return watcher


def _apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
    watcher = getattr(_local, "watcher", None)
    if watcher is not None and cls is CheckpointFunction and torch.is_grad_enabled():
        function, preserve_rng_state, *inputs = args
        # Without an input that requires grad, plain torch gives the parameters nothing either.
        if any(isinstance(x, Tensor) and x.requires_grad for x in inputs):
            return torch.utils.checkpoint.checkpoint(
                function, *inputs, use_reentrant=False, preserve_rng_state=preserve_rng_state
            )
    output = _original.__get__(None, cls)(*args, **kwargs)
    if watcher is not None:
        watcher.applied(cls, (args, kwargs), output)
    return output


@contextmanager
def as_written() -> Iterator[None]:
    """Compiled functions run as they were written inside, in every thread until the last of them leaves."""
    global _readers, _stance
    if "torch._dynamo" not in sys.modules:  # nothing is compiled
        yield
        return
    with _lock:
        _readers += 1
        if _readers == 1:
            _stance = torch.compiler.set_stance("force_eager")
            _stance.__enter__()
    try:
        yield
    finally:
        with _lock:
            _readers -= 1
            if _readers == 0:
                _stance.__exit__(None, None, None)
