"""What happens around the user's `loss.backward()`.

While a recorded module is alive, `torch.autograd.backward` is wrapped: before a pass over recorded forwards the places
of the examples are decided and coupling is ruled out; after it the recordings' owners publish what arrived. A pass over
anything else runs as it always did. `torch.autograd.grad` is wrapped too, to refuse what it could not find.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import wraps
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointError

from dither.capture.coverage import checkpoint_differs, untouched
from dither.capture.layouts import with_axes
from dither.capture.probing import run_backward
from dither.errors import CoverageError
from dither.opacus.deciding import decide
from dither.opacus.graph import Reached, reach
from dither.opacus.recording import ModuleRecording

Sink = Callable[[int, Tensor], None]


class Owner(Protocol):
    """The hooks object that recorded a forward and wants its gradients."""

    verify_loss: bool

    def prepare_backward(self, recordings: list[ModuleRecording]) -> Callable[[], object]:
        """Give each recording's tape a sink; return what publishes after the pass."""
        ...

    def quiet_hooks(self) -> AbstractContextManager[None]:
        """Opacus's own per-layer hooks are silent inside."""
        ...


class _Local(threading.local):
    busy = False


_local = _Local()
_owners: weakref.WeakSet[Any] = weakref.WeakSet()
_unwrapped: dict[str, Callable[..., Any]] = {}
"""Autograd's own functions; kept after the last owner is gone, which may be during a pass."""
_wrapping: list[bool] = []
_taking: list[int] = []
"""One entry for every torch.autograd.grad under way; the engine's threads must see it."""


def attach(owner: Any) -> None:
    """Wrap autograd's two functions, if they are not yet, until the last owner is detached or collected."""
    if owner in _owners:
        return
    _owners.add(owner)
    weakref.finalize(owner, _unwrap_unless_owned).atexit = False
    if not _wrapping:
        _wrapping.append(True)
        _unwrapped.update(backward=torch.autograd.backward, grad=torch.autograd.grad)
        torch.autograd.backward, torch.autograd.grad = _backward, _grad


def detach(owner: Any) -> None:
    """Forget an owner."""
    _owners.discard(owner)
    _unwrap_unless_owned()


def _unwrap_unless_owned() -> None:
    """With the last owner gone, autograd's functions are what they were."""
    if any(True for _ in _owners):
        return
    if torch.autograd.backward is _backward and torch.autograd.grad is _grad:
        torch.autograd.backward, torch.autograd.grad = _unwrapped["backward"], _unwrapped["grad"]
        _wrapping.clear()


@wraps(torch.autograd.backward)
def _backward(
    tensors: Any,
    grad_tensors: Any = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    grad_variables: Any = None,
    inputs: Any = None,
) -> None:
    """Sum of gradients of the tensors with respect to leaves; see `torch.autograd.backward`."""

    def run(retain: bool = False) -> None:
        _unwrapped["backward"](tensors, grad_tensors, retain_graph or retain, create_graph, grad_variables, inputs)

    roots = [tensors] if isinstance(tensors, Tensor) else list(tensors) if isinstance(tensors, (list, tuple)) else []
    if _local.busy or not roots or not all(isinstance(root, Tensor) for root in roots):
        return run()
    reached = reach(roots)
    if not reached.owners:
        return run()
    if create_graph or inputs is not None:
        raise CoverageError(
            "backward is called with create_graph or inputs on a loss of a recorded model; per-example gradients of "
            "gradients, or of some inputs only, are not defined here.",
            fix="call loss.backward() plainly; no gradient penalties on the private model",
        )
    with session(reached):
        with quiet(reached):
            decide(reached, roots, None, all(owner.verify_loss for owner in owners_of(reached)))
        for recording in reached.owners:
            recording.keeps_inputs = bool(retain_graph)
        publish = [owner.prepare_backward(recordings) for owner, recordings in owners_of(reached).items()]
        with untouched(parameters_of(reached)):
            retain = any(recording.undecided for recording in reached.owners)
            if reached.replaying is None:
                run(retain)
            else:
                send(reached, roots, _gradients_for(roots, grad_tensors), bool(retain_graph) or retain)
            settle(reached.owners)
        for each in publish:
            each()
    return None


@wraps(torch.autograd.grad)
def _grad(outputs: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
    """Sum of gradients of the outputs with respect to the inputs; see `torch.autograd.grad`."""
    wanted = [inputs] if isinstance(inputs, Tensor) else list(inputs)
    if not _local.busy and any(hasattr(t, "_forward_counter") for t in wanted):
        roots = [outputs] if isinstance(outputs, Tensor) else [t for t in outputs if isinstance(t, Tensor)]
        recorded = {id(p) for recording in reach(roots).owners for p in recording.parameters.values()}
        if any(id(t) in recorded for t in wanted):
            raise CoverageError(
                "torch.autograd.grad asks for the gradient of a recorded parameter, which only backward() delivers.",
                fix="call module.disable_hooks() (or module.eval()) before that forward, or use loss.backward()",
            )
    _taking.append(threading.get_ident())
    try:
        return _unwrapped["grad"](outputs, inputs, *args, **kwargs)
    finally:
        _taking.pop()


def owners_of(reached: Reached) -> dict[Any, list[ModuleRecording]]:
    """The recordings by the hooks object that made them."""
    found: dict[Any, list[ModuleRecording]] = {}
    for recording in reached.owners:
        owner = recording.hooks()
        if owner is None:
            raise CoverageError(
                "A loss is sent back through a model whose GradSampleModule no longer exists.",
                fix="keep the GradSampleModule (or the hooks object) as long as its outputs are used",
            )
        found.setdefault(owner, []).append(recording)
    return found


@contextmanager
def session(reached: Reached) -> Iterator[None]:
    """One backward pass over recordings: nested ones run plainly; nothing may reach a recorded parameter."""
    names = {id(p): name for recording in reached.owners for name, p in recording.parameters.items()}
    for leaf in reached.leaves:
        if id(leaf) in names:
            raise CoverageError(
                f"Parameter {names[id(leaf)]} receives gradient outside the wrapped module: it would not be clipped.",
                fix="use it only inside the module's forward; a penalty on weights belongs into the optimizer's "
                "weight_decay",
            )
    for recording in reached.owners:
        recording.tape.sink = ignore
    _local.busy = True
    try:
        yield
    except CheckpointError as error:
        raise checkpoint_differs(error) from error
    finally:
        _local.busy = False
        for recording in reached.owners:
            recording.tape.sink = outside
            recording.end_pass()


def parameters_of(reached: Reached) -> dict[str, Tensor]:
    """The recorded parameters behind a loss, by their recording and name."""
    found = enumerate(reached.owners)
    return {f"{name} ({n})" if n else name: p for n, recording in found for name, p in recording.parameters.items()}


def settle(recordings: Sequence[ModuleRecording]) -> None:
    """Deliver gradients that arrived where none had when the places of the examples were decided."""
    for recording in recordings:
        late, recording.late = recording.late, []
        if late:
            sink = recording.tape.sink
            recording.tape.sink = ignore
            with_axes(recording.tape, recording.decide_again())
            recording.tape.sink = sink
            recording.deliver_late(late)


@contextmanager
def quiet(reached: Reached) -> Iterator[None]:
    """No per-layer hook of Opacus's runs inside."""
    with ExitStack() as stack:
        for owner in owners_of(reached):
            stack.enter_context(owner.quiet_hooks())
        yield


def inject(parameters: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
    """Give gradients to parameters as a backward pass does: accumulated, and with every hook run."""
    if parameters:
        _unwrapped["backward"](list(parameters), [g.to(p.dtype) for p, g in zip(parameters, gradients, strict=True)])


def send(reached: Reached, roots: Sequence[Tensor], gradients: Sequence[Tensor], retain_graph: bool) -> None:
    """One plain backward pass inside a session."""
    for recording in reached.owners:
        recording.tape.restores = True
    try:
        run_backward(roots, gradients, retain_graph, reached.replaying)
    finally:
        for recording in reached.owners:
            recording.tape.restores = False


def _gradients_for(roots: Sequence[Tensor], gradients: Any) -> list[Tensor]:
    """What backward() starts with: what was given, and one for a scalar."""
    given = [gradients] if gradients is None or isinstance(gradients, Tensor) else list(gradients)
    given += [None] * (len(roots) - len(given))
    return [torch.ones_like(root) if g is None else g for root, g in zip(roots, given, strict=True)]


def ignore(call: int, gradient: Tensor) -> None:
    """A sink that drops what arrives."""


def outside(call: int, gradient: Tensor) -> None:
    """The sink between backward passes: gradients of inputs may be taken, not gradients of gradients.

    Raises:
        CoverageError: the pass builds a graph of its own, so parameters would be missing from it; or it is a backward
            pass that was not noticed.
    """
    if torch.is_grad_enabled():
        raise CoverageError(
            "A gradient is taken with create_graph=True through a recorded model; its parameters have no part in it.",
            fix="no gradient penalties on the private model, or disable_hooks() before that forward",
        )
    if not _taking and not _local.busy:
        raise CoverageError(
            "A backward pass runs through a recorded model unnoticed: its parameters would receive nothing.",
            fix="call loss.backward() or torch.autograd.backward(loss), not a reference to that function from before "
            "the model was wrapped",
        )
