"""What torch functions do, as far as the recorder must know: by name, for functions and methods alike."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.parameter import UninitializedParameter

from dither.capture.uses import tensors_in
from dither.errors import CoupledExamplesError, UnsupportedOpError

_RANDOM = {"alpha", "bernoulli", "binomial", "cauchy", "dirichlet", "dropout", "exponential", "fractional", "gamma"}
_RANDOM |= {"geometric", "gumbel", "multinomial", "normal", "poisson", "random", "rrelu", "uniform"}
_NOT_RANDOM = {"__rand__", "__random__", "poisson_nll_loss"}

_ELEMENTWISE = {"add", "div", "masked_fill", "mul", "multiply", "radd", "rmul", "rsub", "sub", "truediv", "where"}

BACKWARD = {torch.Tensor.backward, torch.autograd.backward, torch.autograd.grad}
"""Functions that run a backward pass."""

LEAVES_TORCH: set[Callable[..., Any]] = {torch.Tensor.numpy, torch.Tensor.__array__}
"""Functions whose result no torch function sees again."""

FROM_DATA = {torch.tensor, torch.as_tensor, torch.asarray, torch.frombuffer, torch.Tensor.new_tensor}
FROM_DATA |= {torch.sparse_coo_tensor, torch.sparse_csr_tensor, torch.sparse_compressed_tensor}
"""Functions whose result holds what lists and arrays hold, which no torch function shows."""

_GRAD_FN: Any = torch.Tensor.grad_fn
HOOKS = {torch.Tensor.register_hook, _GRAD_FN.__get__}
"""Functions that put something of the user's own on a gradient's way, or give the graph node that takes it."""

READS_METADATA = {torch.Tensor.type_as, torch.Tensor.to, torch.Tensor.view_as, torch.Tensor.expand_as}
READS_METADATA |= {torch.Tensor.reshape_as}
"""Functions that use only shape, dtype or device of a second tensor."""

DESCRIBES: set[Callable[..., Any]] = {
    getattr(torch.Tensor, name).__get__
    for name in (
        "shape",
        "dtype",
        "device",
        "ndim",
        "layout",
        "requires_grad",
        "is_cuda",
        "is_cpu",
        "is_meta",
        "is_leaf",
    )
} | {torch.Tensor.size, torch.Tensor.dim, torch.Tensor.numel, torch.Tensor.stride, torch.Tensor.is_contiguous}
DESCRIBES |= {torch.Tensor.is_floating_point, torch.is_floating_point, torch.Tensor.is_complex, torch.is_complex}
DESCRIBES |= {torch.numel, torch.Tensor.element_size, torch.Tensor.storage_offset, torch.Tensor.__len__}
"""Functions that say what a tensor is, and nothing of what it holds: they change nothing and return no tensor."""

_OVERRIDABLE = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")


def name_of(function: Any) -> str:
    """A torch function's name."""
    return str(getattr(function, "__name__", ""))


def reads_data(function: Any, args: Any) -> bool:
    """Whether a function makes a tensor of something that is no tensor: a list, an array, a number."""
    if function not in FROM_DATA:
        return False
    given = args[1:2] if function is Tensor.new_tensor else args[:1]
    return not (given and isinstance(given[0], Tensor))


@lru_cache(maxsize=4096)
def draws(name: str) -> bool:
    """Whether a function of this name may draw random numbers: what it returns is never a constant."""
    if name in _NOT_RANDOM:
        return False
    words = (word.rstrip("0123456789d") for word in name.partition(".")[0].split("_"))
    return any(word in _RANDOM or word.startswith("rand") for word in words)


def parts_of(index: Any) -> tuple[Any, ...]:
    """What an index is made of, an axis each."""
    return index if isinstance(index, tuple) else (index,)


def place_of(tensor: Tensor) -> Any:
    """Which part of its memory a tensor is."""
    if tensor.layout != torch.strided or isinstance(tensor, UninitializedParameter):
        return None
    return tensor.storage_offset(), tensor.shape


def shape_of(tensor: Tensor) -> torch.Size | None:
    """A tensor's shape; None if it has none."""
    return None if tensor.is_nested or isinstance(tensor, UninitializedParameter) else tensor.shape


def memory_of(tensor: Tensor) -> int:
    """Which memory a tensor's entries are in; 0 if it has none of its own."""
    if place_of(tensor) is None or tensor.is_meta:
        return 0
    memory: int = tensor.untyped_storage()._cdata
    return memory


def entries_of(tensor: Tensor) -> Any:
    """Which entries of which memory a tensor is, in whatever order its axes are; None if it has no such memory."""
    if place_of(tensor) is None or tensor.is_meta:
        return None
    axes = sorted((stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size != 1)
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.dtype, tuple(axes)


@lru_cache(maxsize=4096)
def is_in_place(name: str) -> bool:
    """Whether a function of this name changes its first argument."""
    dunder = name.startswith("__")
    return (
        (name.endswith("_") and not dunder)
        or name == "__setitem__"
        or (dunder and name.startswith("__i") and name not in ("__invert__", "__index__", "__int__"))
    )


def opened(function: Any) -> Callable[..., Any] | None:
    """Torch's own Python code of a function that is made of other torch functions, so that each of these is seen.

    Called under an active mode, such a function hands itself to the mode before its first line, for ever; here it is
    the same code without that line's effect. None for functions that are not of this kind.
    """
    if not isinstance(function, FunctionType):
        return None
    asks = [name for name in _OVERRIDABLE if name in function.__code__.co_names and name in function.__globals__]
    if not asks or "handle_torch_function" not in function.__code__.co_names:
        return None
    closed = {**function.__globals__, **dict.fromkeys(asks, _never)}
    body = FunctionType(function.__code__, closed, function.__name__, function.__defaults__, function.__closure__)
    body.__kwdefaults__ = function.__kwdefaults__
    return body


def _never(*_: Any) -> bool:
    return False


def refuse_batch_statistics(function: Any, args: Any, kwargs: Any) -> None:
    """Raise CoupledExamplesError for a batch normalisation with the statistics of the batch."""
    if function not in (F.batch_norm, torch.batch_norm):
        return
    training = kwargs.get("training", args[5] if len(args) > 5 else False)
    if training:
        shape = tuple(args[0].shape) if args else tuple(kwargs["input"].shape)
        raise CoupledExamplesError(
            f"The batch normalisation of a tensor of shape {shape} uses the statistics of all examples.",
            fix="use group, layer or instance normalisation (Opacus: ModuleValidator.fix), or put the layer in eval "
            "mode",
        )


def writes_back_what_it_read(function: Any, args: Any, kwargs: Any) -> bool:
    """Whether it is an instance normalisation with running statistics: torch 2.6 writes these back as they were."""
    if function not in (F.instance_norm, torch.instance_norm):
        return False
    own_statistics = kwargs.get("use_input_stats", args[5] if len(args) > 5 else True)
    return own_statistics is False


def picks_by_number(function: Any, args: Any) -> bool:
    """Whether a tensor is indexed by single integers: as by Python's, which part it is does not vary by example."""
    if function is not torch.Tensor.__getitem__:
        return False
    tensors = [part for part in parts_of(args[1]) if isinstance(part, Tensor)]
    return all(part.dim() == 0 and part.dtype not in (torch.bool, torch.uint8) for part in tensors)


def autocast_of(args: Any) -> tuple[str, torch.dtype] | None:
    """Device type and dtype of the autocast region that is active for the first tensor's device."""
    for tensor in tensors_in(args):
        kind = tensor.device.type
        return (kind, torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else None
    return None


def keeps_shape(function: Any, args: Any, used: set[int]) -> bool:
    """Whether an elementwise operation gives something of the shape of a tensor that is `used`, by id."""
    if name_of(function).strip("_") not in _ELEMENTWISE:
        return False
    tensors = list(tensors_in(args))
    return any(id(t) in used and all(_broadcasts_to(other.shape, t.shape) for other in tensors) for t in tensors)


def _broadcasts_to(shape: torch.Size, wanted: torch.Size) -> bool:
    return len(shape) <= len(wanted) and all(a in (1, b) for a, b in zip(shape[::-1], wanted[::-1], strict=False))


def in_two_steps(function: Any, args: Any) -> Callable[..., Any] | None:
    """An in-place operation whose target's graph node is not its own, as an ordinary one and a copy into the target.

    For assignment (`h[mask] = p`), and for what changes a view: there the gradient flows through the view's base.
    """
    name = name_of(function)
    if function is torch.Tensor.__setitem__:
        return _assign
    if not is_in_place(name) or not args[0]._is_view():
        return None
    ordinary = name.replace("__i", "__", 1) if name.startswith("__i") else name.removesuffix("_")
    plain = getattr(torch.Tensor, ordinary, None)

    def body(target: Tensor, *others: Any, **options: Any) -> Tensor:
        if plain is None:
            raise UnsupportedOpError(
                f"{name} changes a view in place with a parameter, and has no form that returns its result.",
                fix="build the tensor with torch.cat, torch.where or addition instead",
            )
        return target.copy_(plain(target.clone(), *others, **options))

    return body


def _assign(target: Tensor, index: Any, value: Tensor) -> None:
    """`target[index] = value`, the parameter used by an addition to zeros that have the replaced entries' place."""
    if _is_mask_of(target, index, value):
        # All of the target goes through, so that every entry keeps its place; row-picking would lose it.
        mask = index.to(target.device).view(*index.shape, *[1] * (target.dim() - index.dim()))
        target.copy_(torch.where(mask, value.to(target), target.clone()))
        return
    replaced = target[index]
    nothing = torch.where(torch.zeros_like(replaced, dtype=torch.bool), replaced, 0)
    target[index] = (nothing + value).to(target.dtype)


def _is_mask_of(target: Tensor, index: Any, value: Tensor) -> bool:
    """Whether the index is one mask of the target's first axes, and the value the same wherever it is set."""
    if not isinstance(index, Tensor) or index.dtype != torch.bool:
        return False
    return index.shape == target.shape[: index.dim()] and value.dim() <= target.dim() - index.dim()
