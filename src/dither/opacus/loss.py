"""Opacus's `DPLossFastGradientClipping`: a criterion whose value, sent back, gives clipped gradients.

Legend: B examples.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from opacus.utils import fast_gradient_clipping_utils as stock
from torch import Tensor, nn

from dither.errors import ConfigurationError, LossShapeError
from dither.opacus.clipped_backward import clipped_backward

_StockTensor = stock.DPTensorFastGradientClipping
_stock_loss_init = stock.DPLossFastGradientClipping.__init__


class DPTensorFastGradientClipping(stock.DPTensorFastGradientClipping):
    """One loss per example, shape (B,); `backward` puts the sum of clipped gradients into every `.grad`.

    Scaled and added like a number: `loss / 4`, `loss_a + 0.1 * loss_b`, `sum(losses)`.
    """

    def backward(self) -> None:
        """Clipped gradients, summed over the examples, added to `.grad`; one backward pass.

        Guarantee: adding or removing one example changes the sum by at most the module's max_grad_norm in L2 norm.
        The sum has no noise until `optimizer.step()`.

        Raises:
            LossShapeError: the loss is not one number per example of the module's batch.
            CoupledExamplesError: an example's loss depends on another example.
            CaptureError: its other kinds.
        """
        clipped_backward(self.module, self.optimizer, self.loss_per_sample)

    def __float__(self) -> float:
        """The reduced loss. Not private."""
        return float(self.item())

    def __format__(self, spec: str) -> str:
        """The reduced loss, formatted as a number."""
        return format(self.item(), spec) if spec else str(self)

    def _with(self, losses: Tensor) -> Any:
        """The same loss object, a subclass's settings and all, of other losses."""
        other = copy.copy(self)
        other.loss_per_sample = losses
        return other

    def _other(self, other: Any) -> Any:
        """The per-example losses of another loss object, or the number."""
        if not isinstance(other, _StockTensor):
            return other
        if other.loss_reduction != self.loss_reduction:
            raise ValueError(
                f"Cannot combine losses with different reductions: {self.loss_reduction} and {other.loss_reduction}"
            )
        if other.module is not self.module:
            raise ConfigurationError(
                "Losses of two different private modules are combined.",
                fix="call backward on each; each module's examples are clipped by themselves",
            )
        return other.loss_per_sample

    def __truediv__(self, other: Any) -> Any:
        """Loss / number."""
        return self._with(self.loss_per_sample / other)

    def __mul__(self, other: Any) -> Any:
        """Loss * number."""
        return self._with(self.loss_per_sample * other)

    __rmul__ = __mul__

    def __add__(self, other: Any) -> Any:
        """Loss + loss, or loss + number."""
        return self._with(self.loss_per_sample + self._other(other))

    __radd__ = __add__

    def __sub__(self, other: Any) -> Any:
        """Loss - loss, or loss - number."""
        return self._with(self.loss_per_sample - self._other(other))

    def __rsub__(self, other: Any) -> Any:
        """Number - loss."""
        return self._with(self._other(other) - self.loss_per_sample)

    def __neg__(self) -> Any:
        """-loss."""
        return self._with(-self.loss_per_sample)


class DPLossFastGradientClipping(stock.DPLossFastGradientClipping):
    """A criterion for flash clipping; see `opacus.utils.fast_gradient_clipping_utils.DPLossFastGradientClipping`.

    Args:
        module: the wrapped module.
        optimizer: the `DPOptimizerFastGradientClipping`.
        criterion: a loss object, a function with a `reduction` argument, or a function that returns one number per
            example, shape (B,). The first two may return any shape (B, ...): it is reduced per example. Entries whose
            target is ignore_index do not count in a mean; class weights multiply, and are not divided out.
        loss_reduction: "mean" or "sum", over an example's entries and, for `item()`, over the examples.

    Raises:
        LossShapeError: on a call, if the criterion does not give one number per example.
    """

    def __init__(self, module: Any, optimizer: Any, criterion: Any, loss_reduction: str = "mean") -> None:
        if inspect.isfunction(criterion) and not hasattr(criterion, "reduction"):
            criterion = partial(criterion)  # torch's own functions should not keep a .reduction
        if not hasattr(criterion, "reduction"):
            criterion.reduction = module.loss_reduction
        _stock_loss_init(self, module, optimizer, criterion, loss_reduction)

    def __call__(self, *args: Any, shape: Any = None, **kwargs: Any) -> Any:
        """The loss of a batch.

        Args:
            args: of the criterion.
            shape: for a loss of flattened tokens, the shape (B, T, ...) of the predictions before flattening.
            kwargs: of the criterion.
        """
        losses = self.losses(args, kwargs, shape)
        return DPTensorFastGradientClipping(self.module, self.optimizer, losses, self.loss_reduction)

    def losses(self, args: Any, kwargs: Any, shape: Any = None) -> Tensor:
        """One loss per example, (B,); arguments as of a call."""
        losses, reduces = _unreduced(self.criterion, args, kwargs)
        return _per_example(losses, reduces, self, args, kwargs, shape)


def _unreduced(criterion: Any, args: Any, kwargs: Any) -> tuple[Any, bool]:
    """The criterion's value without reduction, and whether it is known to be a loss with one."""
    if not isinstance(criterion, nn.Module) and "reduction" in _parameters(criterion):
        return criterion(*args, **{**kwargs, "reduction": "none"}), True
    before = criterion.reduction
    criterion.reduction = "none"
    try:
        return criterion(*args, **kwargs), isinstance(criterion, nn.Module)
    finally:
        criterion.reduction = before


def _parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    """A function's parameters, with a partial's keywords as defaults; none for what Python cannot look into."""
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):
        return {}


def _per_example(losses: Any, reduces: bool, loss: Any, args: Any, kwargs: Any, shape: Any) -> Tensor:
    """Reduce an example's own entries.

    Raises:
        LossShapeError: there is no axis of examples, or the criterion is a plain function and there are several axes.
    """
    if not isinstance(losses, Tensor) or losses.dim() == 0:
        raise _not_per_example(losses)
    entries: Tensor = losses
    counted = _counted(entries, loss.criterion, args, kwargs)
    if shape is not None and entries.shape[0] == shape[0] * shape[1]:
        entries = entries.unflatten(0, (shape[0], shape[1]))
        counted = None if counted is None else counted.unflatten(0, (shape[0], shape[1]))
    elif entries.numel() == entries.shape[0]:
        return entries.reshape(-1)
    elif not reduces:
        raise _not_per_example(losses)
    total: Tensor = entries.flatten(1).sum(1)
    if loss.loss_reduction == "sum":
        return total
    number = entries[:1].numel() if counted is None else counted.flatten(1).sum(1).clamp(min=1)
    return total / number


def _counted(losses: Tensor, criterion: Any, args: Any, kwargs: Any) -> Tensor | None:
    """Which entries count in a mean: those whose target is not the criterion's ignore_index."""
    parameters = {} if isinstance(criterion, nn.Module) else _parameters(criterion)
    default = parameters["ignore_index"].default if "ignore_index" in parameters else None
    ignored = kwargs.get("ignore_index", getattr(criterion, "ignore_index", default))
    target = kwargs.get("target", args[1] if len(args) > 1 else None)
    if not isinstance(ignored, int) or not isinstance(target, Tensor) or target.shape != losses.shape:
        return None
    counted: Tensor = target != ignored
    return counted


def _not_per_example(losses: Any) -> LossShapeError:
    got = f"shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else type(losses).__name__
    return LossShapeError(
        f"The criterion must return one loss per example, shape (B,); it returned {got}.",
        fix="two lines in the criterion:\n"
        "    loss = F.mse_loss(prediction, target, reduction='none')\n"
        "    return loss.flatten(1).mean(1)",
    )
