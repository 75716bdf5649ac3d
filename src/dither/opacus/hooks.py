"""Opacus's `GradSampleHooks` and `GradSampleModule` on the recorder: per-example gradients of any forward.

Where Opacus hooks each layer and asks a grad sampler of its type, here the whole forward is recorded, whatever it takes
and returns. Layers with a sampler that the user registered, and Opacus's RNN cells, keep Opacus's own hooks.
"""

from __future__ import annotations

import inspect
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from opacus.grad_sample.functorch import prepare_layer
from opacus.layers.dp_rnn import DPRNNBase, RNNLinear
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from dither.capture.uses import ParamUse
from dither.clipping.clipped_sum import zero_sums
from dither.clipping.gradients import Gradients
from dither.clipping.repeats import Repeats
from dither.clipping.unformed import NotFormed
from dither.errors import ExampleAxisError, UnsupportedOpError
from dither.opacus import backward, batches, stock
from dither.opacus.recording import ModuleRecording


class _Forward:
    """The state of a hooks object between its module's forwards; not copied, not pickled."""

    def __init__(self) -> None:
        self.recording: ModuleRecording | None = None
        self.depth = 0
        self.calls = 0  # of the whole module, under way
        self.free_inputs: set[int] = set()
        self.alive: weakref.WeakSet[ModuleRecording] = weakref.WeakSet()

    def __deepcopy__(self, memo: Any) -> _Forward:
        return _Forward()

    def __reduce__(self) -> Any:
        return _Forward, ()


class GradSampleHooks(stock.GradSampleHooks):
    """Per-example gradients of an unwrapped module; see `opacus.grad_sample.GradSampleHooks`."""

    hooks_enabled: bool
    verify_loss = True
    """Whether to prove, once for each graph, that a scalar loss is a sum of one term per example."""

    def add_hooks(
        self, *, loss_reduction: str = "mean", batch_first: bool = True, force_functorch: bool = False
    ) -> None:
        """Record the module's forwards from now on.

        Args:
            loss_reduction: "mean" or "sum", how the user's loss reduces over the examples.
            batch_first: whether examples lie on axis 0 of inputs and outputs, otherwise on axis 1.
            force_functorch: ignore registered grad samplers.

        Raises:
            ValueError: the module has hooks already.
        """
        if hasattr(self._module, "autograd_grad_sample_hooks"):
            raise ValueError("Trying to add hooks twice to the same model")
        self._recording_state = _Forward()
        handles: list[Any] = []
        self._module.autograd_grad_sample_hooks = self.autograd_grad_sample_hooks = handles
        for module in self._module.modules():
            if force_functorch and self._keeps_sampler(module):
                prepare_layer(module, batch_first=batch_first)  # copies the module, so before it has hooks
            handles.append(module.register_forward_pre_hook(self._before_forward, with_kwargs=True))
            handles.append(module.register_forward_hook(self._after_forward, with_kwargs=True, always_call=True))
            if self._keeps_sampler(module):
                options = {"loss_reduction": loss_reduction, "batch_first": batch_first}
                handles.append(module.register_forward_hook(self.capture_activations_hook))
                handles.append(module.register_full_backward_hook(partial(self.capture_backprops_hook, **options)))
        backward.attach(self)
        self.enable_hooks()

    def remove_hooks(self) -> None:
        """Stop recording, and remove what was added to the module."""
        stock.remove_hooks(self)
        backward.detach(self)

    @classmethod
    def validate(cls, module: nn.Module, *, strict: bool = False) -> list[NotImplementedError]:
        """Layers that update running statistics from the examples, which nothing can make private.

        Raises:
            NotImplementedError: there are some, and `strict` is set.
        """
        errors = [
            NotImplementedError(
                f"Layer {name or 'itself'} ({type(layer).__name__}) keeps running statistics of the examples. "
                "ModuleValidator.fix replaces it."
            )
            for name, layer in module.named_modules()
            if getattr(layer, "track_running_stats", False) and any(True for _ in layer.buffers(recurse=False))
            if any(p.requires_grad for p in layer.parameters())
        ]
        if strict and errors:
            raise NotImplementedError(errors)
        return errors

    def _keeps_sampler(self, module: nn.Module) -> bool:
        """Whether a layer has a sampler of the user's own, or is an RNN cell of Opacus's."""
        kind = type(module)
        if kind is RNNLinear:
            return True
        sampler = None if self.force_functorch else self.GRAD_SAMPLERS.get(kind)
        norm = getattr(self, "NORM_SAMPLERS", {}).get(kind)
        return any(f is not None and not _is_opacus_own(kind, f) for f in (sampler, norm))

    def kept_parameters(self) -> list[Any]:
        """The trainable parameters in the care of a registered sampler."""
        layers = [module for module in self._module.modules() if self._keeps_sampler(module)]
        return [p for layer in layers for p in layer.parameters(recurse=False) if p.requires_grad]

    def _to_record(self, kept_parameters: Sequence[Any]) -> dict[str, Tensor]:
        """The parameters to record: trainable now, and not in the care of a registered sampler."""
        kept = {id(p) for p in kept_parameters}
        found: dict[str, Tensor] = {}
        for name, parameter in self._module.named_parameters():
            if parameter.requires_grad:
                _make_ready(parameter)
                if id(parameter) not in kept:
                    found[name] = parameter
        return found

    @torch.compiler.disable
    def _before_forward(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        forward = self._recording_state
        forward.calls += module is self._module
        if self.hooks_enabled and torch.is_grad_enabled() and isinstance(module, DPRNNBase):
            _refuse_permuted(self._module, module, args)
        if forward.recording is not None:
            forward.depth += 1
            return None
        if self.hooks_enabled and torch.is_grad_enabled() and _trains(module):
            kept = self.kept_parameters()
            parameters = self._to_record(kept)
            if parameters and any(p.requires_grad for p in module.parameters()):
                if not forward.calls:
                    _refuse_direct_forward(self._module)
                backward.attach(self)  # a copy, or one that was loaded, is not yet
                forward.recording = ModuleRecording(self._module, parameters, self.batch_first, forward.free_inputs)
                forward.recording.hooks = weakref.ref(self)
                forward.recording.kept = kept
                forward.depth = 1
                return forward.recording.start((args, kwargs))
        return None

    @torch.compiler.disable
    def _after_forward(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        forward = self._recording_state
        forward.calls -= module is self._module
        if forward.recording is None:
            return
        forward.depth -= 1
        if forward.depth == 0:
            recording, forward.recording = forward.recording, None
            recording.finish((args, kwargs), output)
            recording.tape.sink = backward.outside
            if recording.tape.calls:
                forward.alive.add(recording)

    def alive(self) -> Iterator[ModuleRecording]:
        """The recorded forwards whose outputs still exist."""
        return iter(self._recording_state.alive)

    @contextmanager
    def quiet_hooks(self) -> Iterator[None]:
        """Per-layer hooks of kept samplers are silent inside."""
        before, self.hooks_enabled = self.hooks_enabled, False
        try:
            yield
        finally:
            self.hooks_enabled = before

    def loss_scale(self, batch: int) -> float:
        """What an output gradient is multiplied by, to be that of the example's own loss."""
        if self.loss_reduction not in ("mean", "sum"):
            raise ValueError(f"loss_reduction = {self.loss_reduction}. Only 'sum' and 'mean' losses are supported")
        return float(batch) if self.loss_reduction == "mean" else 1.0

    def prepare_backward(self, recordings: list[ModuleRecording]) -> Callable[[], object]:
        """Per-example gradients are formed as output gradients arrive; with hooks disabled, ordinary ones."""
        if not self.hooks_enabled:
            return plain_gradients(recordings)
        batches.check_same_batch(recordings)
        formed = []
        for recording in recordings:
            gradients = Gradients([recording], "hold", None)
            recording.tape.sink = receiver(recording, gradients, self.loss_scale(recording.batch))
            formed.append(gradients)
        return partial(self._publish, recordings, formed)

    def _publish(self, recordings: list[ModuleRecording], formed: list[Gradients]) -> None:
        """Set `.grad_sample`, (B, *shape), and accumulate `.grad`, for every recorded parameter."""
        scale = self.loss_scale(max(1, recordings[0].batch))
        totals: dict[str, Tensor] = {}
        for name in recordings[0].parameters:
            for gradients in formed:
                part = gradients.formed(name)
                if part is not None:
                    totals[name] = totals[name] + part if name in totals else part
        batch = batches.batch_of(recordings, recordings[0].parameters, totals.keys())
        injected: list[tuple[Tensor, Tensor]] = []
        for name, parameter in recordings[0].parameters.items():
            total = totals.get(name)
            batches.put(parameter, total, batch)
            if total is not None:
                whole = total.sum(0) if len(total) else torch.zeros_like(parameter)
                injected.append((parameter, (whole / scale).to(parameter.dtype)))
        batches.publish(recordings, batch, self.alive())
        backward.inject([p for p, _ in injected], [g for _, g in injected])
        samples = [getattr(p, "grad_sample", None) for p in recordings[0].parameters.values()]
        if not self.grad_accumulation_allowed and any(isinstance(s, list) and len(s) > 1 for s in samples):
            raise ValueError(
                "Poisson sampling is not compatible with grad accumulation. Call optimizer.step() after every "
                "forward/backward pass, or use BatchMemoryManager"
            )


def receiver(
    recording: ModuleRecording,
    gradients: Gradients,
    scale: float,
    repeats: Repeats | None = None,
    scaled: bool = False,
) -> backward.Sink:
    """A sink that hands output gradients, times `scale`, to the collectors.

    With `repeats` these keep norms only, and another pass follows; `scaled`: of scaled losses.
    """
    uses = recording.uses_by_call()

    def receive(use: ParamUse, gradient: Tensor) -> bool:
        """Whether the use's inputs are needed afterwards."""
        gradients.receive(use, gradient)
        collector = gradients.collectors.get(use.name)
        if repeats is not None and isinstance(collector, NotFormed):
            if collector.needs_pass:
                repeats.note(use, gradient, scaled)
            collector.forget()
        return gradients.keeps_inputs(use)

    def sink(call: int, gradient: Tensor) -> None:
        if call < 0 or not recording.batch:  # an input's
            return
        gradient = gradient if scale == 1.0 else gradient * scale
        if uses[call][0].axis is None:
            if bool(gradient.any()):
                recording.late.append((call, gradient))
            return
        recording.tape.calls[call].check_unchanged()
        needed = [receive(use, gradient) for use in uses[call]]
        if any(needed):
            return
        recording.tape.calls[call].conceal()
        if repeats is None and not recording.keeps_inputs:
            recording.tape.calls[call].release()

    recording.receive = receive
    return sink


def plain_gradients(recordings: list[ModuleRecording]) -> Callable[[], dict[Any, Tensor]]:
    """Ordinary gradients, summed over the examples: what autograd would give with the hooks off.

    Returns:
        What adds them to each `.grad`, and gives them by parameter, in float32 or wider.
    """
    gathered = []
    for recording in recordings:
        gradients = Gradients([recording], "two_pass", None)
        recording.tape.sink = receiver(recording, gradients, 1.0)
        gathered.append(gradients)

    def publish() -> dict[Any, Tensor]:
        added: dict[Any, Tensor] = {}
        for recording, gradients in zip(recordings, gathered, strict=True):
            sums = zero_sums(recording.parameters)
            ones = torch.ones(recording.batch, dtype=torch.float64, device=recording.device)
            gradients.add_weighted_sum(ones, sums, ones == 0)
            reached = [n for n in sums if n in gradients.collectors]
            backward.inject([recording.parameters[n] for n in reached], [sums[n] for n in reached])
            for name in reached:
                parameter = recording.parameters[name]
                added[parameter] = added[parameter] + sums[name] if parameter in added else sums[name]
        return added

    return publish


def _refuse_permuted(model: nn.Module, layer: nn.Module, args: Sequence[Any]) -> None:
    """Raise UnsupportedOpError for a packed sequence in another order than the examples'.

    The cells of Opacus's recurrent layers count rows as they are packed, everything else as they are given.
    """
    order = args[0].sorted_indices if args and isinstance(args[0], PackedSequence) else None
    if order is None or torch.equal(order, torch.arange(len(order), device=order.device)):
        return
    own = {id(p) for p in layer.parameters()}
    if any(p.requires_grad and id(p) not in own for p in model.parameters()):
        raise UnsupportedOpError(
            "A recurrent layer of Opacus is given a packed sequence whose examples were sorted by length.",
            fix="pack with the longest first (enforce_sorted=True), or use torch's own layer, exact in any order",
        )


def _refuse_direct_forward(model: nn.Module) -> None:
    """Raise ExampleAxisError if a part of the model is called by the model's forward, which was not called as a module.

    Then only the parts are recorded, and rows that the forward made of an example's tokens would be examples.
    """
    code = getattr(inspect.unwrap(type(model).forward), "__code__", None)
    frame = sys._getframe(1)
    while frame is not None and code is not None:
        if frame.f_code is code and frame.f_locals.get(code.co_varnames[0]) is model:
            raise ExampleAxisError(
                f"The forward method of {type(model).__name__} is called directly, past its hooks: which rows are one "
                "example's cannot be known in its layers.",
                fix="call the model itself: model(x), not model.forward(x)",
            )
        frame = frame.f_back  # type: ignore[assignment]


def _trains(module: nn.Module) -> bool:
    """Whether a module, or a part of it that has trainable parameters, is in train mode."""
    return module.training or any(
        part.training and any(p.requires_grad for p in part.parameters(recurse=False)) for part in module.modules()
    )


def _is_opacus_own(kind: type, sampler: Callable[..., Any]) -> bool:
    own = getattr(sampler, "__module__", "").startswith("opacus.grad_sample")
    return own and kind.__module__.startswith(("torch.", "opacus."))


def _make_ready(parameter: Any) -> None:
    """Attributes that Opacus's optimizers expect, also on a parameter that became trainable after wrapping."""
    if not hasattr(parameter, "grad_sample"):
        parameter.grad_sample = None
    if not hasattr(parameter, "_forward_counter"):
        parameter._forward_counter = 0


class GradSampleModule(GradSampleHooks, stock.GradSampleModule):
    """Per-example gradients of any module, whatever its forward takes; see `opacus.GradSampleModule`.

    After `loss.backward()` every trainable parameter has `.grad_sample`, shape (B, *parameter.shape): each example's
    gradient of its own loss.

    Raises (from backward):
        CoupledExamplesError: an example's loss depends on another example, in the model or in the loss.
        CaptureError: its other kinds, where the gradients could not be proved exact.
    """
