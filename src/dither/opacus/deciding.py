"""Where the examples lie in recorded forwards, decided just before a backward pass; and that they do not mix.

The seeds are the places whose order of examples is known: one loss per example in flash clipping, otherwise the
outputs of the module that the loss reads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor
from torch.autograd.graph import GradientEdge

from dither.capture.broadcast import refuse_outer_differences
from dither.capture.examples import ExampleAxis, Layout, candidates
from dither.capture.layouts import Places, Probe, decide_examples
from dither.capture.probing import Seed, send_back, send_back_to
from dither.errors import CaptureError, CoupledExamplesError, CoverageError, ExampleAxisError
from dither.opacus.batches import refuse_parts
from dither.opacus.graph import Place, Reached
from dither.opacus.recording import ModuleRecording
from dither.opacus.separable import prove_separable


def decide(reached: Reached, roots: Sequence[Tensor], losses: Seed | None, verify_loss: bool) -> None:
    """Decide every recording's layouts, and prove that neither the models nor the loss couple examples.

    Args:
        reached: what lies behind the roots.
        roots: what backward was called on.
        losses: one loss per example, if that is known; otherwise the module's outputs tell the examples apart.
        verify_loss: whether to prove that a scalar loss is a sum over examples.

    Raises:
        CoupledExamplesError: an example's loss depends on another example.
        ExampleAxisError: where the examples lie is undecided.
        CaptureError: its other kinds.
    """
    recordings: list[ModuleRecording] = [owner for owner in reached.owners if owner.batch]
    if losses is not None or verify_loss:
        refuse_outer_differences(reached.loss, [recording.batch for recording in recordings])
    refuse_parts(recordings)
    for recording in recordings:
        recording.place_inputs()
        recording.edges = reached.calls.get(id(recording), {})
    seeds: list[Seed] = []

    def seeded() -> list[Seed]:
        if not seeds:
            seeds.extend([losses] if losses is not None else _frontier_seeds(reached))
        return seeds

    order = _order_of_loss(reached, losses) if losses is not None and reached.volatile else None
    anew = False
    for position, recording in enumerate(recordings):
        probe = _Probing(recording, reached, seeded)
        context = (reached.structure, position, order)
        recording.decide_again = partial(recording.decide_anew, probe, recording.known, context)
        try:
            anew |= recording.decide(probe, recording.known, context, (position, reached.kind))
        except CoupledExamplesError as error:
            raise recording.explained(error) from error
    if losses is None and verify_loss and (anew or reached.volatile) and any(r.batch > 1 for r in recordings):
        try:
            prove_separable(roots, seeded(), reached.loss)
        except BaseException:
            for recording in recordings:
                recording.forget()
            raise


def _order_of_loss(reached: Reached, losses: Seed) -> tuple[Layout | None, ...]:
    """Where each example's loss reads the module's outputs, for losses that pick entries by index."""
    edges = {number: edge for number, (edge, _) in enumerate(reached.frontier)}
    shapes = {number: place.shape for number, (_, place) in enumerate(reached.frontier)}
    places = Places(shapes, lambda number: f"an output of the module that the loss reads, number {number}")
    found = decide_examples(
        places, losses.layout.batch, partial(send_back_to, edges, [losses], replaying=reached.replaying)
    )
    return tuple(found[number] for number in sorted(found))


@dataclass(frozen=True, eq=False)
class _Probing:
    """Sends NaN from the seeds with as many examples as the recording; the others must not reach it."""

    recording: ModuleRecording
    reached: Reached
    seeds: Callable[[], Sequence[Seed]]

    def __call__(self, examples: list[int] | None, zero: bool = False) -> dict[int, Tensor]:
        return _probe(self.recording, self.reached, self.seeds())(examples, zero)


def _probe(recording: ModuleRecording, reached: Reached, seeds: Sequence[Seed]) -> Probe:
    places = {**reached.calls.get(id(recording), {}), **recording.followed}
    same = [seed for seed in seeds if seed.layout.batch == recording.batch]
    others = [seed for seed in seeds if seed.layout.batch != recording.batch]
    if not same:
        raise CoverageError(
            f"A recorded forward of {recording.batch} examples is behind the loss, but nothing that tells them apart.",
            fix="return the predictions from the module, one row per example on the batch axis",
        )
    if others and any(
        bool(entries.any()) for entries in send_back_to(places, others, None, replaying=reached.replaying).values()
    ):
        raise CoupledExamplesError(
            f"A forward of {recording.batch} examples feeds a loss or a forward of {others[0].layout.batch}.",
            fix="keep one row per example on the batch axis from module to module and in the loss",
        )
    if all(any(leaf is owner.anchor for owner in reached.owners) for leaf in reached.leaves):
        # Nobody's leaf receives NaN: what arrives is looked at as it passes, and not kept.
        return partial(send_back, recording.tape, same, replaying=reached.replaying)
    return partial(send_back_to, places, same, replaying=reached.replaying)


def _frontier_seeds(reached: Reached) -> list[Seed]:
    """Seeds at the module outputs that the loss reads, then at recorded operations that it reads around them."""
    outputs = [(edge, place) for edge, place in reached.frontier if place.call is None and place.owner.batch]
    inner = [(edge, place) for edge, place in reached.frontier if place.call is not None and place.owner.batch]
    seeds = []
    for edge, place in outputs:
        layout = ExampleAxis(place.owner.axis_of(len(place.shape)), 1, place.owner.batch, 1)
        seeds.append(place.seed(edge, layout))
    for edge, place in inner:
        seeds.append(place.seed(edge, _layout_at(edge, place, seeds, reached)))
    return seeds


def _layout_at(edge: GradientEdge, place: Place, seeds: Sequence[Seed], reached: Reached) -> Layout:
    """The layout of an operation's output that the loss reads directly."""
    recording: ModuleRecording = place.owner
    assert place.call is not None
    known: Layout | None = recording.known.get(place.call)
    same = [seed for seed in seeds if seed.layout.batch == recording.batch]
    if known is None and same:
        axes = decide_examples(
            Places.of(recording.tape, recording.anchor, recording.nodes),
            recording.batch,
            _probe(recording, reached, same),
            False,
            recording.known,
        )
        known = axes.get(place.call)
    return known or _only_layout(edge, place, same, reached)


def _only_layout(edge: GradientEdge, place: Place, others: list[Seed], reached: Reached) -> ExampleAxis:
    """The only layout of an operation's output under which no examples are coupled.

    Raises:
        ExampleAxisError: several layouts are possible.
        CoupledExamplesError: none is.
    """
    recording: ModuleRecording = place.owner
    left: list[tuple[ExampleAxis, dict[int, Layout | None]]] = []
    error: CaptureError | None = None
    for layout in sorted(candidates(place.shape, recording.batch), key=lambda a: (a.axis, a.outer)):
        if layout.axis == len(place.shape) - 1 > 0 and recording.batch > 1:
            continue  # the features of a layer
        probe = _probe(recording, reached, [*others, place.seed(edge, layout)])
        try:
            places = Places.of(recording.tape, recording.anchor, recording.nodes)
            axes = decide_examples(places, recording.batch, probe, True, recording.known)
        except CaptureError as refusal:
            error = error or refusal
            continue
        if not any(axes == found for _, found in left):
            left.append((layout, axes))
    if len(left) == 1:
        return left[0][0]
    if not left and error is not None:
        raise error
    assert place.call is not None
    raise ExampleAxisError(
        f"Where {recording.batch} examples lie in the output of {recording.tape.calls[place.call].name}, shape "
        f"{tuple(place.shape)}, is not certain: the module returns nothing with one entry per example.",
        fix="return the predictions or the per-example losses from the module, the examples on the batch axis, and "
        "compute the loss outside of it",
    )
