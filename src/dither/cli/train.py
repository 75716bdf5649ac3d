"""`dither train`: one command from data to weights, samples and a certificate."""

from __future__ import annotations

import re
import shlex
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import yaml
from rich.console import Console

from dither.cli.beginning import begin, has_beginning, prepare
from dither.cli.choosing import choose_for_data
from dither.cli.data import check_same, check_there, fit_patches, images_of, read_data
from dither.cli.delta import warning_of
from dither.cli.interrupts import StopRequest
from dither.cli.locking import training_alone
from dither.cli.models import run_model, start_model
from dither.cli.options import Options
from dither.cli.progress import TrainingProgress
from dither.cli.public_data import read_public
from dither.cli.reading import read_options, with_settings
from dither.cli.results import grid_steps, write_results, write_samples
from dither.cli.run_folder import Images, RunFolder, check_unused
from dither.cli.warm_up import planned_release
from dither.errors import RunFolderError
from dither.report import write_report
from dither.telemetry import Writers, check_installed, names

if TYPE_CHECKING:
    from torch import nn

    from dither.accounting import Event
    from dither.data import ImageData
    from dither.training import PrivateTraining, Step

INTERRUPTED = 130
GRID_PER_CLASS = 4
GRID_SEED = 0
_CLASSES_SHOWN = 20


@dataclass(frozen=True)
class Run:
    """A run with its data and its model, before or after its first step."""

    folder: RunFolder
    options: Options
    model: nn.Module
    data: ImageData
    public: ImageData | None = None
    """What is trained on before anything private, where it is read already."""
    training: PrivateTraining | None = None
    """A new run's, where nothing comes before it."""


def run(words: Sequence[str]) -> int:
    """Run `dither train`; returns the exit code."""
    options = read_options(words)
    check_installed(options.telemetry)
    import torch

    if options.performance.threads is not None:
        torch.set_num_threads(options.performance.threads)
    console = Console(markup=False, highlight=False)  # a path may hold brackets
    with ExitStack() as until_done:  # the folder is this process's until then
        ready = (_create if options.resume is None else _open)(options, console, until_done)
        return _run(ready, console)


def _run(ready: Run, console: Console) -> int:
    """Train to the end, or to an interrupt, and write what the run hands over; returns the exit code."""
    options, folder = ready.options, ready.folder.path
    console.print(f"Run folder {folder}", soft_wrap=True)
    if options.seed is not None:
        console.print("A seed makes the noise predictable: this run is NOT PRIVATE.", style="bold red")
    try:
        training = _resume(ready) if ready.folder.has_state else _begin(ready, console)
        finished = training is not None and _train(ready, training, console)
    except KeyboardInterrupt:  # the second, which does not wait for the step
        console.print(f"Interrupted. {_way_on(ready.folder)}", soft_wrap=True)
        return INTERRUPTED
    if training is not None:
        write_results(ready.folder, ready.model, training)
    if training is None or not finished:
        write_report(folder)
        console.print(f"Interrupted. Go on with:\n  dither train --resume {folder}", soft_wrap=True)
        return INTERRUPTED
    write_samples(ready.folder.samples, ready.folder.images, ready.model, options.recipe, training.ema)
    console.print(f"Spent epsilon {training.epsilon():.3f} at delta {training.delta:g}.")
    console.print(f"Samples {ready.folder.samples}", soft_wrap=True)
    console.print(f"Certificate {ready.folder.certificate}", soft_wrap=True)
    console.print(f"Report {write_report(folder)}", soft_wrap=True)
    example = f"dither sample {folder} --label {_last_class(ready.folder)} --count 16"
    console.print(f"More:\n  {example}", soft_wrap=True)
    return 0


def _create(options: Options, console: Console, until_done: ExitStack) -> Run:
    """Make the folder, held, and everything in memory; nothing is left behind if an option cannot work."""
    import torch

    if options.output is not None:
        check_unused(options.output)
    data = read_data(options.data, console)
    images = images_of(data)
    if options.data.path is not None:
        console.print(_classes(images), soft_wrap=True)  # a folder that is no class shows
    options = choose_for_data(options, images, len(data), console)
    _warn_of_delta(options.privacy.delta, len(data), console)
    if options.model == "dit" and options.finetune_from is None:  # a checkpoint has patches of its own
        options = with_settings(options, {"recipe": fit_patches(options.recipe, images, console)})
    public = read_public(options, images, console)
    folder = RunFolder.create(options.output or _default_output(images.dataset), images)
    until_done.enter_context(training_alone(folder.path))
    try:
        if options.seed is not None:
            torch.manual_seed(options.seed)
        ready = Run(folder, options, start_model(options, folder), data, public)
        training = _private_training(ready, planned_release(options))  # refuses what cannot work, before anything runs
        prepare(options, folder, ready.model, data, public)
        folder.config.write_text(options.text)
    except BaseException:
        folder.discard()
        raise
    return ready if has_beginning(options) else replace(ready, training=training)


def _classes(images: Images) -> str:
    shown = ", ".join(images.class_names[:_CLASSES_SHOWN])
    more = images.num_classes - _CLASSES_SHOWN
    return f"{images.num_classes} classes: {shown}{f' and {more} more' if more > 0 else ''}"


def _warn_of_delta(delta: float, size: int, console: Console) -> None:
    """Say before anything is spent that a delta promises nothing, as the report would afterwards."""
    warning = warning_of(delta, size, "images")
    if warning is not None:
        console.print(
            f"{warning} Choose a smaller --privacy.delta, by a factor of ten where you can.",
            style="bold red",
            soft_wrap=True,
        )


def _way_on(folder: RunFolder) -> str:
    """What to do after a run was cut off, in words."""
    if folder.can_resume:
        return f"What was done since the last save is lost. Go on with:\n  dither train --resume {folder.path}"
    return f"Nothing was saved yet: remove {folder.path} and begin again."


def _open(options: Options, console: Console, until_done: ExitStack) -> Run:
    """Find the folder, held before anything of its state is read."""
    assert options.resume is not None
    folder = RunFolder.open(options.resume)
    until_done.enter_context(training_alone(folder.path))
    if not folder.can_resume:
        raise _without_state(folder)
    check_there(options.data, folder.config)
    data = read_data(options.data, console)
    check_same(folder.images, data)
    return Run(folder, options, run_model(folder, options), data)


def _without_state(folder: RunFolder) -> RunFolderError:
    """Why a run cannot be resumed: its results are written after its state, which so was there."""
    if folder.certificate.exists():
        return RunFolderError(
            f"{folder.path} has a certificate, and the state that a resume needs is gone from {folder.state}",
            fix="put it back from a copy, or start again: dither train",
        )
    return RunFolderError(f"{folder.path} was stopped before its state was saved", fix="start again: dither train")


def _begin(ready: Run, console: Console) -> PrivateTraining | None:
    """Come to the first private step; None if that was interrupted."""
    if ready.training is not None:
        return ready.training
    prior = begin(ready.options, ready.folder, ready.model, ready.data, ready.public, console)
    if prior is None:
        return None
    training = _private_training(ready, prior)
    training.save(ready.folder.state)  # what was released is never released again
    ready.folder.beginning.unlink()
    return training


def _private_training(ready: Run, prior: tuple[Event, ...]) -> PrivateTraining:
    from dither.diffusion.recipe import build_loss, build_optimizer
    from dither.training import PrivateTraining

    options, images = ready.options, ready.folder.images
    optimizer, scheduler = build_optimizer(options.recipe, ready.model)
    privacy, performance = options.privacy, options.performance
    return PrivateTraining(
        ready.model,
        optimizer,
        ready.data,
        build_loss(options.recipe, images.num_classes),
        expected_batch_size=privacy.expected_batch_size,
        steps=privacy.steps,
        max_grad_norm=privacy.max_grad_norm,
        delta=privacy.delta,
        epsilon=privacy.epsilon,
        noise_multiplier=privacy.noise_multiplier,
        clipping=privacy.clipping,
        microbatch_size=performance.microbatch_size,
        strategy=performance.strategy,
        memory_budget=performance.memory_budget,
        rows_per_example=options.recipe.multiplicity,
        ema_decay=options.recipe.ema_decay,
        scheduler=scheduler,
        seed=options.seed,
        prior=prior,
    )


def _resume(ready: Run) -> PrivateTraining:
    from dither.diffusion.recipe import build_loss, build_optimizer
    from dither.training import PrivateTraining

    optimizer, scheduler = build_optimizer(ready.options.recipe, ready.model)
    loss = build_loss(ready.options.recipe, ready.folder.images.num_classes)
    training = PrivateTraining.resume(ready.folder.state, ready.model, optimizer, ready.data, loss, scheduler=scheduler)
    performance = ready.options.performance
    training.set_performance(
        microbatch_size=performance.microbatch_size,
        strategy=performance.strategy,
        memory_budget=performance.memory_budget,
    )
    return training


def _train(ready: Run, training: PrivateTraining, console: Console) -> bool:
    """Take the remaining steps; returns whether the run is complete."""
    folder, options = ready.folder, ready.options
    steps, done = training.steps, training.index
    spent = training.epsilon() if done else 0.0
    drawn_after = grid_steps(steps, options.telemetry.samples)
    last_save = time.monotonic()
    warn = partial(console.print, style="bold red", soft_wrap=True)
    with (
        StopRequest() as stop,
        Writers(folder.path, options.telemetry, done=done, config=yaml.safe_load(options.text), say=warn) as writers,
        TrainingProgress(steps, options.privacy.expected_batch_size, done, spent, console) as progress,
    ):
        began = time.perf_counter()
        for step in training:
            seconds = time.perf_counter() - began
            progress.show(step, seconds)
            writers.log(step.index, _values(step, seconds))
            if step.index in drawn_after:
                training.save(folder.state)  # a crash must not take steps that a grid shows out of the ledger
                last_save = time.monotonic()
                grid = folder.grid(step.index)
                write_samples(grid, folder.images, ready.model, options.recipe, training.ema, GRID_PER_CLASS, GRID_SEED)
            if stop.wanted:
                break
            if time.monotonic() - last_save >= options.save_every:
                training.save(folder.state)
                last_save = time.monotonic()
            began = time.perf_counter()
        training.save(folder.state)
    return training.index >= steps


def _values(step: Step, seconds: float) -> dict[str, float]:
    """What is logged of a step; an empty batch has no loss."""
    values = {names.EPSILON: step.epsilon, names.SECONDS: seconds}
    if step.batch_size:
        values |= {names.LOSS: step.loss, names.CLIP_FRACTION: step.clip_fraction, names.DROPPED: float(step.dropped)}
    return values


def _default_output(dataset: str) -> Path:
    name = re.sub(r"[@:]", "-", dataset)  # not all systems allow them in a folder's name
    return Path("runs") / f"{name}-{datetime.now():%Y%m%d-%H%M%S}"


def _last_class(folder: RunFolder) -> str:
    """A class to show in an example; quoted where a shell needs it."""
    images = folder.images
    return shlex.quote(images.class_names[-1] if images.class_names else str(images.num_classes - 1))
