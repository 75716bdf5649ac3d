"""Compiled modules that stay compiled while recording: what lies between the parameters' operations is compiled.

A compiled graph would hide its operations from the recorder. So a module's graph is cut around every operation that
takes a parameter or a tensor computed from parameters: those run as torch functions, which the recorder sees; the runs
between them have no parameter and are compiled, forward and backward. Whatever cannot be cut runs as it is written.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from dither.capture import watching
from dither.capture.recorder import Recorder
from dither.capture.saving import hooked
from dither.errors import ConfigurationError

if TYPE_CHECKING:
    from dither.capture.tracing import Tracer

Module = TypeVar("Module", bound=nn.Module)


def compile(module: Module, *, backend: str = "inductor", dynamic: bool | None = None) -> Module:
    """Compile a module, in place, so that it stays compiled while dither records it.

    Call it on the blocks of a model. Everywhere else it does what `module.compile(backend=..., dynamic=...)` does. The
    keys of the state dict stay, and a copy of the module is not compiled, as with torch's own method.

    Args:
        module: what is called; its graph must be traced without a break, or it runs as written while recording.
        backend: of `torch.compile`.
        dynamic: of `torch.compile`; by default sizes that change are compiled as symbols the second time.

    Returns:
        The module.

    Raises:
        ConfigurationError: something that is no module.
    """
    if not isinstance(module, nn.Module):
        raise ConfigurationError(
            f"dither.compile takes a torch.nn.Module; it was given {type(module).__name__}.",
            fix="for block in model.blocks: dither.compile(block)",
        )
    plain = torch.compile(module._call_impl, backend=backend, dynamic=dynamic)
    module._compiled_call_impl = Compiled(module, plain, backend, dynamic)
    return module


class Compiled:
    """Stands for a module's call.

    Args:
        module: whose call it is.
        plain: the call as torch compiles it.
        backend: compiles the segments.
        dynamic: of `torch.compile`.
    """

    def __init__(self, module: nn.Module, plain: Callable[..., Any], backend: str, dynamic: bool | None) -> None:
        self._module, self._plain = module, plain
        self._backend, self._dynamic = backend, dynamic
        self._tracer: Tracer | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's output."""
        if torch.compiler.is_compiling():  # as a part of something larger
            return self._module._call_impl(*args, **kwargs)
        recorder = watching.current()
        if recorder is None:
            return self._plain(*args, **kwargs)
        if not isinstance(recorder, Recorder) or not _may_compile(recorder):
            return self._module._call_impl(*args, **kwargs)
        if self._tracer is None:
            from dither.capture.tracing import tracer_of  # heavy, and needed by few

            self._tracer = tracer_of(self._module, self._backend, self._dynamic)
        return self._tracer(recorder, self._module._call_impl, args, kwargs)


def _may_compile(recorder: Recorder) -> bool:
    """Whether the recorder alone watches, nobody asks for saved tensors, and gradients are taken."""
    return (
        torch._C._len_torch_function_stack() == 1
        and torch._C._get_function_stack_at(0) is recorder
        and torch._C._is_torch_function_enabled()
        and torch.is_grad_enabled()
        and not hooked()
        and not torch._C._are_functorch_transforms_active()
        and torch.utils._python_dispatch._get_current_dispatch_mode() is None
    )
