"""The recorder: sees every torch operation that takes a trainable parameter.

At such an operation the parameter is detached, so autograd computes input gradients only, and the output's
gradient is delivered to the tape. Tensors computed from parameters and constants alone stay in autograd and
count as parameters where they meet the examples (design: parameter-only subgraphs).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.overrides import TorchFunctionMode

from dither.capture.uses import OpCall, ParamUse, Tape, map_tensors, tensors_in
from dither.errors import BufferUpdateError, CoupledExamplesError, NestedRecorderError, UnsupportedOpError

_PARAMETER, _DERIVED, _CONSTANT, _BUFFER = "parameter", "derived", "constant", "buffer"
_RANDOM = ("rand", "normal", "bernoulli", "multinomial", "poisson", "dropout", "uniform", "exponential", "geometric")
_REORDERING = {
    "__getitem__",
    "index_select",
    "gather",
    "take",
    "take_along_dim",
    "scatter",
    "scatter_add",
    "index_add",
    "index_put",
    "index_copy",
    "masked_select",
    "masked_scatter",
    "sort",
    "topk",
    "unique",
    "repeat_interleave",
    "flip",
    "roll",
}
_BACKWARD = {torch.Tensor.backward, torch.autograd.backward, torch.autograd.grad}
_LEAVES_TORCH: set[Callable[..., Any]] = {torch.Tensor.numpy, torch.Tensor.__array__}
_READS_METADATA = {torch.Tensor.type_as, torch.Tensor.to, torch.Tensor.view_as, torch.Tensor.expand_as}
_READS_METADATA |= {torch.Tensor.reshape_as}
_active = threading.local()


class Claim(Protocol):
    """Finds the rules for an operation's operands; see `dither.rules`."""

    def __call__(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], used: set[int]
    ) -> tuple[dict[str, Any], list[tuple[str | int, int, Any]]]:
        """Return operands by name and (slot, id of the tensor, rule) for every used tensor."""


class _Anchor(torch.autograd.Function):
    """A graph node for a fresh output, without a copy, so that in-place operations after it keep working."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, output: Tensor) -> Tensor:
        ctx.mark_dirty(output)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None]:
        return None, None


class Recorder(TorchFunctionMode):
    """Record every use of `parameters` by the operations run inside `with recorder:`.

    Args:
        parameters: trainable parameters by name.
        buffers: the model's buffers: constants, which the examples must not change.
        claim: finds the rules for an operation (`dither.rules.claim`).
        on_output: called with every recorded operation's first output, in the graph, and the call's index.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        buffers: Iterable[Tensor],
        claim: Claim,
        on_output: Callable[[Tensor, int], None] | None = None,
    ) -> None:
        super().__init__()
        self.tape = Tape()
        self._claim = claim
        self._on_output = on_output
        self._names = {id(p): name for name, p in parameters.items()}
        # Strong references, so that no id is reused while the recorder lives.
        self._kinds: dict[int, tuple[str, Tensor]] = {id(b): (_BUFFER, b) for b in buffers}
        self._kinds |= {id(p): (_PARAMETER, p) for p in parameters.values()}
        self.anchor = torch.zeros((), requires_grad=True)
        self._trace: list[Any] = []
        self.reorders_by_data = False

    def __enter__(self) -> Recorder:
        """Start recording; one recorder at a time in a thread."""
        if getattr(_active, "recorder", None) is not None:
            raise NestedRecorderError(
                "A dither recording was started inside another one.",
                fix="call clipped_sum, per_example_gradients or verify outside the loss function",
            )
        super().__enter__()
        _active.recorder = self
        return self

    def __exit__(self, *exc_info: Any) -> None:
        """Stop recording."""
        _active.recorder = None
        super().__exit__(*exc_info)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Pass operations through; record those that use a parameter with the examples."""
        kwargs = kwargs or {}
        if getattr(func, "__wrapped__", func) in _BACKWARD:
            raise NestedRecorderError(
                "A backward pass runs inside the loss function.",
                fix="return the per-example loss and let dither run the backward pass; no gradient penalties",
            )
        if func in _LEAVES_TORCH:
            return func(*map_tensors(torch.Tensor.detach, args), **kwargs)
        if func is torch.nn.functional.batch_norm:
            _refuse_batch_statistics(*args, **kwargs)
        output = self._dispatch(func, args, kwargs)
        self._trace.append((func, _options(args), _options(kwargs)))
        if not self.reorders_by_data and _base_name(func) in _REORDERING:
            self._note_reordering(args, kwargs, output)
        return output

    @property
    def trace(self) -> tuple[Any, ...]:
        """Every operation that ran, with its options: where it is the same, so are the examples' places."""
        return tuple(self._trace)

    def _note_reordering(self, args: Any, kwargs: Any, output: Any) -> None:
        """Remember that rows are picked by an index tensor, after a parameter was used: places may change by step."""
        differentiable = any(t.requires_grad for t in tensors_in(output))
        by_index = sum(1 for t in tensors_in((args, kwargs)) if not t.is_floating_point()) > 0
        self.reorders_by_data = differentiable and by_index

    def _dispatch(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        kinds = self._kinds
        used: set[int] = set()
        batch_free = True
        for tensor in tensors_in((args, kwargs)):
            kind = kinds.get(id(tensor))
            if kind is None:
                batch_free = False
            elif kind[0] in (_PARAMETER, _DERIVED):
                used.add(id(tensor))
        if not used:
            return self._run_without_parameters(func, args, kwargs, batch_free)
        if batch_free:
            return self._run_on_parameters_alone(func, args, kwargs)
        if func in _READS_METADATA and id(args[0]) not in used:
            return func(*args, **kwargs)
        if not torch.is_grad_enabled():
            return func(*args, **kwargs)
        return self._record(func, args, kwargs, used)

    def _run_without_parameters(self, func: Any, args: Any, kwargs: Any, batch_free: bool) -> Any:
        name = getattr(func, "__name__", "")
        in_place = _is_in_place(name)
        target = args[0] if in_place and args and isinstance(args[0], Tensor) else None
        if target is not None and not batch_free:
            self._forget_constant(target, name)
        output = func(*args, **kwargs)
        if batch_free and not any(word in name for word in _RANDOM):
            for tensor in tensors_in(output):
                self._kinds.setdefault(id(tensor), (_CONSTANT, tensor))
        return output

    def _run_on_parameters_alone(self, func: Any, args: Any, kwargs: Any) -> Any:
        output = func(*args, **kwargs)
        for tensor in tensors_in(output):
            kind = self._kinds.get(id(tensor))
            if kind is None or kind[0] == _CONSTANT:
                self._kinds[id(tensor)] = (_DERIVED if tensor.requires_grad else _CONSTANT, tensor)
        if _is_in_place(getattr(func, "__name__", "")) and args and isinstance(args[0], Tensor):
            for tensor in (args[0], *([] if args[0]._base is None else [args[0]._base])):
                if tensor.requires_grad and id(tensor) not in self._names:
                    self._kinds[id(tensor)] = (_DERIVED, tensor)
        return output

    def _forget_constant(self, target: Tensor, name: str) -> None:
        for tensor in (target, *([] if target._base is None else [target._base])):
            kind = self._kinds.get(id(tensor))
            if kind is None:
                continue
            if kind[0] == _BUFFER:
                raise BufferUpdateError(
                    f"A buffer of shape {tuple(tensor.shape)} is changed in place by {name} from the examples.",
                    fix="make the buffer a constant (eval mode, track_running_stats=False): it would not be private",
                )
            del self._kinds[id(tensor)]

    def _record(self, func: Any, args: Any, kwargs: Any, used: set[int]) -> Any:
        name = getattr(func, "__name__", "")
        if _is_in_place(name) and (id(args[0]) in used or name == "__setitem__"):
            raise UnsupportedOpError(
                f"{name} writes a parameter and examples into one tensor in place.",
                fix="build the tensor with torch.cat, torch.where or addition instead",
            )
        operands, claimed = self._claim(func, args, kwargs, used)
        rng_state = torch.get_rng_state() if any(rule.replays for _, _, rule in claimed) else None
        detach = _detacher(clone=args[0] if _is_in_place(name) else None)
        saved_args, saved_kwargs = map_tensors(detach, args), map_tensors(detach, kwargs)
        saved_operands = map_tensors(detach, operands)
        output = func(*map_tensors(self._live, args), **map_tensors(self._live, kwargs))
        if rng_state is not None and torch.equal(rng_state, torch.get_rng_state()):
            rng_state = None
        outputs = [t for t in tensors_in(output) if t.is_floating_point() or t.is_complex()]
        call = OpCall(
            index=len(self.tape.calls),
            function=func,
            args=saved_args,
            kwargs=saved_kwargs,
            operands=saved_operands,
            output_shapes=tuple(t.shape for t in outputs),
            rng_state=rng_state,
            versions=tuple((t, t._version) for t in tensors_in((saved_args, saved_kwargs))),
        )
        self.tape.calls.append(call)
        for slot, tensor_id, rule in claimed:
            tensor = self._kinds[tensor_id][1]
            label = self._names.get(tensor_id) or f"a tensor of shape {tuple(tensor.shape)} computed from parameters"
            self.tape.uses.append(ParamUse(call, slot, tensor, label, rule))
        return self._listen(output, outputs, call.index)

    def _live(self, tensor: Tensor) -> Tensor:
        kind = self._kinds.get(id(tensor))
        return tensor.detach() if kind is not None and kind[0] in (_PARAMETER, _DERIVED) else tensor

    def _listen(self, output: Any, outputs: list[Tensor], call: int) -> Any:
        replaced: dict[int, Tensor] = {}
        for position, tensor in enumerate(outputs):
            live = tensor if tensor.requires_grad else _Anchor.apply(self.anchor, tensor)
            _after_tensor_hooks(live, partial(self.tape.deliver, call, position))
            replaced[id(tensor)] = live
            if position == 0 and self._on_output is not None:
                self._on_output(live, call)
        return map_tensors(lambda t: replaced.get(id(t), t), output)


def _refuse_batch_statistics(
    input: Tensor,
    running_mean: Any = None,
    running_var: Any = None,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    *_: Any,
    **__: Any,
) -> None:
    if training:
        raise CoupledExamplesError(
            f"The batch normalisation of a tensor of shape {tuple(input.shape)} uses the statistics of all examples.",
            fix="use group, layer or instance normalisation (Opacus: ModuleValidator.fix), or put the layer in eval "
            "mode",
        )


def _after_tensor_hooks(tensor: Tensor, deliver: Callable[[Tensor], None]) -> None:
    """Deliver a tensor's gradient once every hook that anybody registers on the tensor has run."""
    number = tensor.output_nr

    def hook(gradients: tuple[Tensor | None, ...]) -> None:
        gradient = gradients[number]
        if gradient is not None:
            deliver(gradient)

    assert tensor.grad_fn is not None
    tensor.grad_fn.register_prehook(hook)


def alias(tensor: Tensor, anchor: Tensor, deliver: Callable[[Tensor], None]) -> Tensor:
    """The same memory as a tensor that has a graph node, whose gradients are delivered."""
    with _unsafe_preserve_version_counter(tensor):  # nothing is written
        tracked: Tensor = _Anchor.apply(anchor, tensor.detach())
    _after_tensor_hooks(tracked, deliver)
    return tracked


def _base_name(function: Any) -> str:
    name: str = getattr(function, "__name__", "")
    return name if name.startswith("__") else name.removesuffix("_")


def _options(tree: Any) -> Any:
    """The arguments that are not tensors, hashable."""
    if isinstance(tree, Tensor):
        return None
    if isinstance(tree, (list, tuple)):
        return tuple(_options(item) for item in tree)
    if isinstance(tree, dict):
        return tuple((key, _options(item)) for key, item in tree.items())
    if isinstance(tree, slice):
        return ("slice", _options((tree.start, tree.stop, tree.step)))
    return tree if isinstance(tree, (int, float, str, bool, torch.dtype)) else type(tree)


def _is_in_place(name: str) -> bool:
    dunder = name.startswith("__")
    return (
        (name.endswith("_") and not dunder)
        or name == "__setitem__"
        or (dunder and name.startswith("__i") and name not in ("__invert__", "__index__", "__int__"))
    )


def _detacher(clone: Tensor | None) -> Callable[[Tensor], Tensor]:
    """Detach each tensor once, keeping identity; `clone` is about to be overwritten."""
    done: dict[int, Tensor] = {}

    def detach(tensor: Tensor) -> Tensor:
        if id(tensor) not in done:
            done[id(tensor)] = tensor.detach().clone() if tensor is clone else tensor.detach()
        return done[id(tensor)]

    return detach
