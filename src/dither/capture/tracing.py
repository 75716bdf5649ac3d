"""Dynamo's traces of a module, run under a recorder: segments compiled, the operations between them seen."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch._dynamo
import torch._functorch.config
from torch import nn
from torch._C._dynamo import eval_frame

from dither.capture import watching
from dither.capture.recorder import Recorder
from dither.capture.segments import Segment, split

_LIMIT = 16
"""Variants of a module's graph (batch sizes, options) after which it runs as written."""

ISOLATES = hasattr(eval_frame, "set_eval_frame_isolate_recompiles_id")
"""Whether this torch counts the variants of each call by itself, as torch 2.13 does; without that nothing is traced."""

_local = threading.local()
_tracers: dict[Any, Tracer] = {}


class AsWrittenWarning(UserWarning):
    """Something was to be compiled and runs as it is written."""


Backend = Callable[..., Callable[..., Any]]
"""What `torch.compile` takes as a backend: a graph and its inputs in, something that computes it out."""


def tracer_of(module: nn.Module, backend: str, dynamic: bool | None) -> Tracer:
    """The tracer of a module, which modules of the same class and shapes share."""
    shapes = tuple((name, p.shape, p.dtype) for name, p in module.named_parameters())
    key = (type(module), backend, dynamic, shapes)
    if key not in _tracers:
        _tracers[key] = Tracer(type(module).__name__, backend, dynamic)
    return _tracers[key]


class Tracer:
    """Traces calls, each variant once, and runs the traces.

    Args:
        name: of what is called, for people.
        backend: compiles the segments.
        dynamic: of `torch.compile`.
    """

    def __init__(self, name: str, backend: str, dynamic: bool | None) -> None:
        self._name, self._backend = name, torch._dynamo.lookup_backend(backend)
        self._refused = not ISOLATES
        if self._refused:
            _warn(name, NotImplementedError(f"torch {torch.__version__} cannot count its variants; torch 2.13 can"))
            return
        self._frames = _Frames(self._cut, dynamic)

    def __call__(self, recorder: Recorder, call: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> Any:
        """What the call returns; as it is written where it cannot be traced and cut."""
        if self._refused:
            return call(*args, **kwargs)
        _local.ran = False
        try:
            with recorder.paused():
                output = self._frames(_called, call, args, kwargs)
            if _local.ran:
                return output
            self._refused = True  # no operation, or Dynamo is turned off: the recorder saw nothing
        except Exception as error:
            if _local.ran:
                raise
            self._refused = True
            _warn(self._name, error)
        return call(*args, **kwargs)

    def _cut(self, graph: Any, inputs: Any) -> Callable[..., Any]:
        whole, segments = split(graph)
        for segment in segments:
            module = getattr(whole, segment.name)
            setattr(whole, segment.name, _Compiled(module, segment, self._backend))

        def run(*given: Any) -> Any:
            recorder = watching.current()
            assert isinstance(recorder, Recorder)
            _local.ran = True
            with recorder.resumed():
                return whole.forward(*given)

        return run


def _called(call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return call(*args, **kwargs)


class _Frames:
    """Calls functions through Dynamo, in this thread, whatever stance the process has.

    Args:
        backend: compiles what Dynamo traces.
        dynamic: of `torch.compile`.
    """

    def __init__(self, backend: Backend, dynamic: bool | None) -> None:
        context = torch._dynamo.optimize(
            backend, nopython=True, dynamic=dynamic, recompile_limit=_LIMIT, isolate_recompiles=True
        )
        self._callback = getattr(context, "callback", None)  # nothing if TORCHDYNAMO_DISABLE is set
        self._number = getattr(context, "_isolate_recompiles_id", -1)

    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        number = eval_frame.set_eval_frame_isolate_recompiles_id(self._number)
        before = eval_frame.set_eval_frame(self._callback)
        try:
            return function(*args)
        finally:
            eval_frame.set_eval_frame(before)
            eval_frame.set_eval_frame_isolate_recompiles_id(number)


class _Compiled(nn.Module):
    """A segment: compiled where the recorder may miss it; elsewhere, and if that fails, as traced.

    Its operations do nothing but return their results, so running them again does no harm.
    """

    def __init__(self, module: Any, segment: Segment, backend: Backend) -> None:
        super().__init__()
        self.module, self._segment, self._backend = module, segment, backend
        self._frames = _Frames(self._compile, segment.symbolic)
        self._marked = not segment.symbolic
        self._refused = False

    def forward(self, *inputs: Any) -> Any:
        """What the segment's operations return."""
        recorder = watching.current()
        if (
            self._refused
            or not isinstance(recorder, Recorder)
            or not recorder.kinds.may_miss(inputs, self._segment.behind)
        ):
            return self.module.forward(*inputs)
        try:
            with recorder.paused():
                self._mark(inputs)
                output = self._frames(_called, self.module.forward, inputs, {})
        except Exception as error:
            self._refused = True
            _warn("A part of a module", error)
            return self.module.forward(*inputs)
        recorder.missed(self.module.code, inputs, output)
        return output

    def _mark(self, inputs: tuple[Any, ...]) -> None:
        """Say which sizes are no symbols, before the first call compiles."""
        if self._marked:
            return
        self._marked = True
        for tensor, static in zip(inputs, self._segment.static, strict=True):
            for axis in static or ():
                torch._dynamo.mark_static(tensor, axis)

    def _compile(self, graph: Any, inputs: Any) -> Callable[..., Any]:
        # The proofs send gradients back several times, so backward must not write over what forward saved. Torch asks
        # for that again in every backward pass: an empty list is the answer. A cached graph would bring its own.
        with torch._functorch.config.patch(donated_buffer=False, enable_autograd_cache=False):
            compiled = self._backend(graph, inputs)
        context = torch._guards.TracingContext.try_get()
        if context is not None and context.fw_metadata is not None:
            context.fw_metadata.bw_donated_idxs = []
        return compiled


def _warn(what: str, error: Exception) -> None:
    cause = getattr(error, "inner_exception", error)
    said = (str(cause).strip().splitlines() or [""])[0]
    warnings.warn(
        f"{what} runs as it is written while dither records it: {type(cause).__name__}: {said}",
        AsWrittenWarning,
        stacklevel=3,
    )
