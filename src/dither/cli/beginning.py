"""What a run does before its private steps: first the public training, then the warm-up on what is released.

beginning.pt   where it stands: the part, its weights and optimizer, and how many private examples there are; until the
               private steps' state takes its place
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console

from dither.cli.interrupts import StopRequest
from dither.cli.public import PUBLIC, add_facts
from dither.cli.public_data import check_unchanged, public_facts, public_training, read_public
from dither.cli.warm_up import release, warm_up_training
from dither.diffusion.over_mixture import OverMixture
from dither.errors import LedgerError, RunFolderError
from dither.files import remove_partials, replacing
from dither.release import ClassMixtures

if TYPE_CHECKING:
    from torch import nn

    from dither.accounting import Event
    from dither.cli.options import Options
    from dither.cli.run_folder import RunFolder
    from dither.data import ImageData
    from dither.diffusion.ordinary_training import OrdinaryTraining

START, PUBLIC_STEPS, WARM_UP = "start", "public", "warm-up"
_LINES = 10


def has_beginning(options: Options) -> bool:
    """Whether a run trains before its private steps."""
    return options.pretrain.path is not None or options.warm_up.kind != "none"


def prepare(options: Options, folder: RunFolder, model: nn.Module, data: ImageData, public: ImageData | None) -> None:
    """Write into a new run folder what its beginning starts with, and which data it takes as public.

    Args:
        options: of the run.
        folder: of the run.
        model: as it was built or loaded.
        data: the private images.
        public: as `read_public` gave it.
    """
    if public is not None:
        add_facts(folder, PUBLIC, {"pretraining": public_facts(public, options.pretrain)})
    if has_beginning(options):
        _write(folder, {"part": START, "examples": len(data), "model": model.state_dict()})


def begin(
    options: Options,
    folder: RunFolder,
    model: nn.Module,
    data: ImageData,
    public: ImageData | None,
    console: Console,
) -> tuple[Event, ...] | None:
    """Train on the public data set and on what is released of each class, from where `beginning.pt` stands.

    Guarantee: the release is one of `dither.release`, and is made once for a run folder; training on it is
    post-processing, and on public data costs nothing. Whether data is public is not checked.

    Args:
        options: of the run.
        folder: of the run, after `prepare`.
        model: changed in place.
        data: the private images.
        public: the public ones; read again where they are None and needed.
        console: where progress is shown.

    Returns:
        What was released, for the run's ledger; None if it was interrupted, to be resumed.

    Raises:
        LedgerError: there are more or fewer private images than when the run began.
        RunFolderError: `beginning.pt` is damaged, or the public data are not those that the run began with.
    """
    state = _read(folder)
    _check_size(state["examples"], data)
    model.load_state_dict(state["model"])
    if options.pretrain.path is not None and state["part"] != WARM_UP:
        if public is None:
            public = read_public(options, folder.images, console)
            assert public is not None
            check_unchanged(folder, public, options.pretrain)
        if not _train(public_training(options, model, public), PUBLIC_STEPS, state, options, folder, console):
            return None
    if options.warm_up.kind == "none":
        return ()
    released = release(options, folder, data, console)
    if isinstance(released, ClassMixtures):
        assert isinstance(model, OverMixture)
        model.fill(released)
        return released.events
    if not _train(warm_up_training(options, folder, model, released), WARM_UP, state, options, folder, console):
        return None
    return released.events


def _train(
    training: OrdinaryTraining, part: str, state: dict[str, Any], options: Options, folder: RunFolder, console: Console
) -> bool:
    """Take the remaining steps of a part; False if it was asked to stop."""
    if state["part"] == part:
        training.load_state_dict(state)

    def where() -> dict[str, Any]:
        return {"part": part, "examples": state["examples"], **training.state_dict()}

    last_save = time.monotonic()
    shown = {1, *(training.steps * line // _LINES for line in range(1, _LINES + 1))}
    with StopRequest() as stop:
        while training.index < training.steps and not stop.wanted:
            loss = training.step()
            if training.index in shown:
                console.print(f"{part} step {training.index}/{training.steps}  loss {loss:.4f}")
            if time.monotonic() - last_save >= options.save_every:
                _write(folder, where())
                last_save = time.monotonic()
        _write(folder, where())
    return not stop.wanted


def _check_size(begun_with: int, data: ImageData) -> None:
    """One ledger covers one data set: that of which statistics were released, and that of the private steps."""
    if len(data) != begun_with:
        raise LedgerError(
            f"the data set has {len(data)} examples; the run began with {begun_with}, and its ledger does not cover "
            "another data set",
            fix="put the run's data set back where its config.yaml says, or start a new run",
        )


def _read(folder: RunFolder) -> dict[str, Any]:
    try:
        state: dict[str, Any] = torch.load(folder.beginning, map_location="cpu", weights_only=True)
        return {"part": state["part"], "examples": state["examples"], "model": state["model"], **state}
    except Exception as error:  # a damaged file fails in as many ways as there are readers
        raise RunFolderError(
            f"{folder.beginning} is damaged: {error}", fix="restore it from a copy, or start again: dither train"
        ) from error


def _write(folder: RunFolder, state: dict[str, Any]) -> None:
    """Write where the beginning stands; a crash leaves what was written before."""
    remove_partials(folder.beginning)  # of this run's processes before, which were killed
    with replacing(folder.beginning) as partial:
        torch.save(state, partial)
