"""A model, a batch and a loss to be verified: cast, cut, and looked at with the other examples exchanged."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dither.capture.coverage import check_loss
from dither.capture.uses import map_tensors, tensors_in
from dither.clipping.verify import RandomState, coarsest, same_losses
from dither.errors import ConfigurationError, CoupledExamplesError, DitherError


@dataclass(frozen=True)
class Subject:
    """A model, a batch and a loss.

    Attributes:
        model: any module.
        batch: what `loss_fn` takes: tensors in nested tuples, lists and dicts.
        loss_fn: (model, batch) to one loss per example, shape (B,).
    """

    model: nn.Module
    batch: Any
    loss_fn: Callable[[nn.Module, Any], Tensor]

    def losses(self) -> Tensor:
        """The losses, from a plain run; an error in it is the user's.

        Raises:
            ConfigurationError: it failed.
        """
        with users_code("the model or the loss", "if the types differ, try --dtype keep; --debug shows the traceback"):
            return self.loss_fn(self.model, self.batch)

    def cast(self, dtype: torch.dtype) -> Subject:
        """The model (changed in place) and the batch, with floating-point and complex tensors of this precision."""

        def convert(tensor: Tensor) -> Tensor:
            if tensor.is_complex():
                return tensor.to(dtype.to_complex())
            return tensor.to(dtype) if tensor.is_floating_point() else tensor

        return replace(self, model=self.model._apply(convert), batch=map_tensors(convert, self.batch))

    @property
    def dtype(self) -> torch.dtype:
        """The coarsest parameter's precision."""
        return coarsest(self.model.parameters())

    def has_examples_first(self, batch: int) -> bool:
        """Whether some tensor of the batch has all examples on its first axis."""
        return any(has_examples(t, batch) for t in tensors_in(self.batch))

    def map_examples(self, batch: int, change: Callable[[Tensor], Tensor]) -> Subject:
        """Change every tensor of the batch that has all examples on its first axis."""
        return replace(self, batch=map_tensors(lambda t: change(t) if has_examples(t, batch) else t, self.batch))


def has_examples(tensor: Tensor, batch: int) -> bool:
    """Whether a tensor's first axis is as long as the batch."""
    return tensor.dim() > 0 and tensor.shape[0] == batch


def cut(subject: Subject, examples: int) -> tuple[Subject, str]:
    """The batch's first examples, and what was done in words.

    Raises:
        ConfigurationError: there are fewer than two, the batch cannot be cut, or model or loss fail on it.
        LossShapeError: the loss is not one number per example.
    """
    state = RandomState(p.device for p in subject.model.parameters())
    with torch.no_grad():
        batch = check_loss(subject.losses()).shape[0]
    if batch < 2:
        raise ConfigurationError(
            f"a batch of {batch} cannot show whether examples influence each other", fix="return two or more examples"
        )
    words = f"{batch} examples"
    if 0 < examples < batch:
        subject = subject.map_examples(batch, lambda t: t[:examples])
        words = f"the first {examples} of {batch} examples"
    state.restore()
    with torch.enable_grad():
        found = check_loss(subject.losses()).shape[0]
    state.restore()
    if found != min(batch, examples or batch):
        raise ConfigurationError(
            f"the batch cannot be cut to {examples} of its {batch} examples: cut on the first axis of each tensor, it "
            f"has {found} losses",
            fix="--examples 0 compares the whole batch; or return a smaller one",
        )
    return subject, words


def exchange(subject: Subject) -> str:
    """Look for dependences that leave no trace in the graph: the losses stay when the other examples are exchanged.

    Returns:
        What was found, in words.

    Raises:
        CoupledExamplesError: a loss changed.
    """
    state = RandomState(p.device for p in subject.model.parameters())

    def losses(of: Subject) -> Tensor:
        with torch.no_grad():
            found = of.losses()
        state.restore()
        return found

    before = losses(subject)
    batch = before.shape[0]
    if not subject.has_examples_first(batch):
        return "not tried, for no tensor of the batch has the examples on its first axis"
    if not same_losses(losses(subject), before, subject.dtype):
        return "not tried, for the losses are others at every call"
    for stay in (range(batch // 2), range(batch // 2, batch)):
        others = subject.map_examples(batch, partial(_copy_over, stay))
        kept = list(stay)
        if not same_losses(losses(others)[kept], before[kept], subject.dtype):
            raise CoupledExamplesError(
                f"The losses of examples {kept[0]} to {kept[-1]} change when the others are exchanged, though no "
                "gradient need show it: an example's loss depends on values of other examples.",
                fix="remove what is computed from the whole batch (batch statistics, a detached mean, a threshold, a "
                "ranking, a capacity), or compute it from each example alone; if a tensor of the batch is as long as "
                "the batch by chance, return another number of examples",
            )
    return "no loss changed when the other examples were exchanged"


def _copy_over(stay: range, tensor: Tensor) -> Tensor:
    """The first of the examples that stay in place of every one that does not."""
    places = [i if i in stay else stay[0] for i in range(tensor.shape[0])]
    return tensor[places]


@contextmanager
def users_code(what: str, fix: str) -> Iterator[None]:
    """Turn whatever the user's own code raises into a message that says where.

    Raises:
        ConfigurationError: it raised.
    """
    try:
        yield
    except DitherError:
        raise
    except (Exception, SystemExit) as error:
        lines = str(error).strip().splitlines() or [""]
        raise ConfigurationError(f"{what} raised {type(error).__name__}: {lines[0]}{_place(error)}", fix=fix) from error


def _place(error: BaseException) -> str:
    """The last line of the user's own code that the error passed, if there is one."""
    ours = str(Path(__file__).parent.parent)
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not frame.filename.startswith((ours, "<")) and "site-packages" not in frame.filename:
            return f"\n  at {frame.filename}:{frame.lineno}"
    return ""
