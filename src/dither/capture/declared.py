"""Inputs that reach a model otherwise than as arguments: which vary with the examples, and which do not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from dither.capture import watching
from dither.capture.examples import ExampleAxis
from dither.capture.uses import map_tensors
from dither.errors import ConfigurationError, CoupledExamplesError, ExampleAxisError


@dataclass(frozen=True)
class Declared:
    """What was said of a tensor.

    Attributes:
        axis: where the examples lie; None for a constant.
    """

    axis: int | None

    def layout(self, tensor: Tensor, batch: int) -> ExampleAxis:
        """Where `batch` examples lie in the tensor.

        Raises:
            ExampleAxisError: that many do not fit on the axis.
        """
        assert self.axis is not None
        size = tensor.shape[self.axis]
        if size % batch:
            raise ExampleAxisError(
                f"A tensor of shape {tuple(tensor.shape)} was declared batched on axis {self.axis}, but the loss has "
                f"{batch} examples.",
                fix="declare the tensor that belongs to this batch: model.condition = dither.batched(condition) before "
                "each call",
            )
        return ExampleAxis(self.axis, 1, batch, size // batch)


_declared = WeakIdKeyDictionary()


def batched(tensor: Tensor, axis: int = 0) -> Tensor:
    """Declare that a tensor holds one entry (or k consecutive entries) for each example.

    For conditioning that a model reads from an attribute: `model.condition = dither.batched(condition)`. The tensor
    is then followed from there, so that a mixture of examples is noticed also before the first parameter.

    Args:
        tensor: any shape with B (or k B) entries on `axis`.
        axis: where the examples lie.

    Returns:
        The same memory as another tensor; the declaration lasts as long as that lives.

    Raises:
        ConfigurationError: the tensor has no such axis.
    """
    if not -tensor.dim() <= axis < tensor.dim():
        raise ConfigurationError(
            f"A tensor of shape {tuple(tensor.shape)} has no axis {axis} for the examples.",
            fix="name the axis that has one entry per example",
        )
    return _declare(tensor, Declared(axis % tensor.dim()))


def constant(tensor: Tensor) -> Tensor:
    """Declare that a tensor is the same whatever the examples are: a grid, a table of positions, a public prompt.

    What a layer makes of constants alone is then a constant of every example, as with a registered buffer. That it
    does not depend on the data is the caller's word: nothing can check it.

    Args:
        tensor: any tensor.

    Returns:
        The same memory as another tensor; the declaration lasts as long as that lives.
    """
    return _declare(tensor, Declared(None))


def _declare(tensor: Tensor, declared: Declared) -> Tensor:
    other = tensor.view_as(tensor)
    _declared[other] = declared
    watcher = watching.current()
    if watcher is not None:
        watcher.declare(other, declared)
    return other


def follow(batch: Any, count: int) -> Any:
    """Declare the tensors of a loaded batch that have one entry per example, unless they are declared already.

    Args:
        batch: tensors in nested tuples, lists and dicts.
        count: number of examples.
    """

    def declared(tensor: Tensor) -> Tensor:
        fits = tensor.is_floating_point() and tensor.dim() > 0 and tensor.shape[0] == count
        return batched(tensor) if fits and not tensor.requires_grad and tensor not in _declared else tensor

    return map_tensors(declared, batch)


@contextmanager
def naming_undeclared(model: nn.Module) -> Iterator[None]:
    """Add to a refusal which tensors the model holds of which nothing is known: one may be what has to be declared."""
    try:
        yield
    except (CoupledExamplesError, ExampleAxisError) as error:
        held = list(_undeclared(model))
        if not held:
            raise
        more = f" and {len(held) - 2} more" if len(held) > 2 else ""
        fix = (
            f"{error.fix}. The model holds {', '.join(held[:2])}{more}, no buffer: put dither.constant(tensor) in its "
            "place if it does not depend on the examples, dither.batched(tensor) if it has an entry for each"
        )
        raise type(error)(error.what, fix=fix).with_traceback(error.__traceback__) from None


def _undeclared(model: nn.Module) -> Iterator[str]:
    """Where modules hold tensors that are no parameters or buffers, and of which nothing was said."""
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            if attribute not in ("_parameters", "_buffers", "_modules"):
                for path, tensor in _paths(attribute, value):
                    if tensor not in _declared and not isinstance(tensor, nn.Parameter):
                        yield f"{name}.{path}".removeprefix(".")


def _paths(path: str, tree: Any) -> Iterator[tuple[str, Tensor]]:
    """Tensors in lists and dicts, and how each is written; one level deep."""
    if isinstance(tree, Tensor):
        yield path, tree
    elif isinstance(tree, (list, tuple, dict)):
        for key, item in tree.items() if isinstance(tree, dict) else enumerate(tree):
            if isinstance(item, Tensor):
                yield f"{path}[{key!r}]", item


def declarations() -> list[tuple[Tensor, Declared]]:
    """Every declared tensor that is alive."""
    return list(_declared.items())
