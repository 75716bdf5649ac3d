"""The batches that wait for a step: which of them a backward pass over recorded forwards belongs to.

Every recorded parameter has one entry of `.grad_sample` per batch, (B, *shape), and a step clips row i over all
parameters. So row i must hold all that one example gives to the step, and nothing of another example.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dither.errors import CoverageError
from dither.opacus.recording import ModuleRecording

_ORIGIN = "_dither_origin"


@dataclass(frozen=True, eq=False)
class Batch:
    """One entry of every recorded parameter's `.grad_sample`.

    Attributes:
        examples: its rows.
    """

    examples: int


@dataclass(frozen=True)
class _Origin:
    """Where an entry comes from.

    Attributes:
        batch: whose entry it is.
        reached: whether a loss reached the parameter; otherwise the entry is a zero without memory.
    """

    batch: Batch
    reached: bool


def check_same_batch(recordings: Sequence[ModuleRecording]) -> None:
    """Raise CoverageError if forwards of different numbers of examples are behind one loss: which is which?"""
    if len({recording.batch for recording in recordings}) > 1:
        raise _different_sizes([recording.batch for recording in recordings])


def refuse_parts(recordings: Sequence[ModuleRecording]) -> None:
    """Raise CoverageError if forwards behind one loss took different rows of one tensor: two examples, not one."""
    first: dict[Any, ModuleRecording] = {}
    for recording in recordings:
        earlier = first.setdefault(recording.hooks(), recording)
        if recording.takes_other_rows(earlier):
            raise CoverageError(
                "Forwards of different rows of one tensor are in one loss. Row i of each would count as one example, "
                "so that several examples were clipped as one.",
                fix="send each part's loss back before the next forward (with Poisson sampling: use "
                "BatchMemoryManager). If the parts are views of the same examples, give each a tensor of its own: "
                "model(x[:n].clone())",
            )


def batch_of(recordings: Sequence[ModuleRecording], parameters: Mapping[str, Any], reached: Collection[str]) -> Batch:
    """The waiting batch that a pass adds to, or a new one.

    A pass adds to the batch that its forwards were sent back into before, and to one of whose parameters it reaches
    none, as in Opacus: each parameter's first gradients belong together.

    Args:
        recordings: the forwards that were sent back.
        parameters: all that are recorded, by name.
        reached: names of those that received gradients.

    Raises:
        CoverageError: whether row i stands for the same example there and here cannot be known, or it was clipped.
    """
    waiting = _waiting(parameters)
    before = {recording.published_in for recording in recordings} - {None}
    own = [batch for batch in waiting if batch in before]
    if len(own) > 1:
        raise CoverageError(
            f"Forwards of {len(own)} batches that were sent back apart are in one loss. Row i of each would count as "
            "one example here, and as different ones there.",
            fix="send back all losses over the same examples at once: (loss_a + loss_b).backward()",
        )
    if len(own) < len(before) and sum_waits(parameters.values()):
        raise CoverageError(
            "A second loss over a forward is sent back after its examples were clipped for the step under way: each "
            "would be clipped twice.",
            fix="add the losses and call backward once: (loss_a + loss_b).backward()",
        )
    if own:
        return own[0]
    examples = recordings[0].batch
    for batch, names in waiting.items():
        if names and reached and names.isdisjoint(reached):
            if batch.examples != examples:
                raise _different_sizes([batch.examples, examples])
            return batch
    check_order(recordings, any(waiting.values()) or sum_waits(parameters.values()))
    return Batch(examples)


def check_order(recordings: Sequence[ModuleRecording], waits: bool) -> None:
    """Raise CoverageError if another forward was sent back between these and now, and waits for the step."""
    if waits and any(recording.overtaken for recording in recordings):
        raise CoverageError(
            "Two forwards were made first, then their losses sent back one after the other. Whether row i of both is "
            "the same example cannot be known.",
            fix="if it is, send back one loss: (loss_a + loss_b).backward(). If the examples are different, call "
            "loss_a.backward() before the second forward (with Poisson sampling: use BatchMemoryManager)",
        )


def publish(recordings: Sequence[ModuleRecording], batch: Batch | None, alive: Iterable[ModuleRecording]) -> None:
    """Note that forwards were sent back into a batch, and overtook those that are alive and were not."""
    for recording in recordings:
        recording.published, recording.published_in = True, batch
    for recording in alive:
        recording.overtaken |= not recording.published


def put(parameter: Any, gradients: Tensor | None, batch: Batch) -> None:
    """Add gradients (B, *shape) to the parameter's entry of a batch; None: no loss reached it."""
    entries = _entries(parameter)
    place = next((i for i, entry in enumerate(entries) if _origin(entry, batch) is not None), len(entries))
    known = _origin(entries[place], batch) if place < len(entries) else None
    if gradients is None:
        if known is not None:
            return
        zero = torch.zeros((), dtype=parameter.dtype, device=parameter.device)
        found = zero.expand(batch.examples, *parameter.shape)
    else:
        found = entries[place] + gradients if known is not None and known.reached else gradients
    vars(found)[_ORIGIN] = _Origin(batch, gradients is not None)
    entries[place:] = [found, *entries[place + 1 :]]
    parameter.grad_sample = entries[0] if len(entries) == 1 else entries


def sum_waits(parameters: Iterable[Any]) -> bool:
    """Whether a skipped step's clipped sum waits for the noise."""
    sums = [getattr(parameter, "summed_grad", None) for parameter in parameters]
    return any(isinstance(total, Tensor) and not hasattr(total, "_processed") for total in sums)


def _waiting(parameters: Mapping[str, Any]) -> dict[Batch, set[str]]:
    """The batches that no step took yet, and the names of the parameters that their losses reached."""
    found: dict[Batch, set[str]] = {}
    for name, parameter in parameters.items():
        for entry in _entries(parameter):
            origin = _origin(entry)
            if origin is not None and not hasattr(entry, "_processed"):
                names = found.setdefault(origin.batch, set())
                names.update([name] if origin.reached else [])
    return found


def _entries(parameter: Any) -> list[Tensor]:
    held = parameter.grad_sample
    return list(held) if isinstance(held, list) else [] if held is None else [held]


def _origin(entry: Tensor, batch: Batch | None = None) -> _Origin | None:
    """Where an entry comes from, if that is known and, where a batch is given, if it is that."""
    origin: _Origin | None = vars(entry).get(_ORIGIN)
    return origin if origin is not None and batch in (None, origin.batch) else None


def _different_sizes(sizes: Sequence[int]) -> CoverageError:
    return CoverageError(
        f"Forwards of {sorted(sizes)} examples are in one loss. Row i of each would count as one example, so that "
        "leaving out one example changes every other.",
        fix="call the module and send its loss back before the next forward, or give both as many examples",
    )
