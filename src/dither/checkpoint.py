"""Checkpoints: one folder, written so that a crash leaves the old state or the new one.

The folder holds one `state-<step>-<token>.pt`, which `torch.load(weights_only=True)` reads (weights, optimizer, EMA,
ledger, settings), and `checkpoint.json`, which names it and its SHA-256 and is replaced atomically and last. Other
files in the folder are left alone.
"""

from __future__ import annotations

import json
import pickle
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dither import files
from dither.accounting import Ledger
from dither.errors import DitherError, LedgerError, OutputPathError, RunFolderError

if TYPE_CHECKING:
    from dither.training import PrivateTraining

_FORMAT = "dither checkpoint 1"
_MANIFEST = "checkpoint.json"


def write(path: Path, state: Mapping[str, Any], step: int) -> None:
    """Write a state; the one that was there before is removed once the new one is complete.

    Args:
        path: the folder; made if missing.
        state: tensors and plain values, which `torch.load(weights_only=True)` can read.
        step: number of completed steps.

    Raises:
        OutputPathError: the folder cannot be written.
    """
    state_file = path / f"state-{step:08d}-{secrets.token_hex(4)}.pt"
    try:
        files.make_folder(path)
        with files.replacing(state_file) as partial:
            torch.save(dict(state), partial)
            torch.load(partial, map_location="cpu", weights_only=True, mmap=True)  # what cannot be read is no copy
        manifest = {"format": _FORMAT, "state": state_file.name, "sha256": files.sha256(state_file), "step": step}
        with files.replacing(path / _MANIFEST) as partial:
            partial.write_text(json.dumps(manifest, indent=2))
    except (OSError, RuntimeError, pickle.PickleError, AttributeError, TypeError) as error:
        _remove_unnamed(state_file)
        raise OutputPathError(
            f"The checkpoint cannot be written to {path}: {error}",
            fix="check the path, its permissions, the disk, and that optimizer and scheduler hold plain numbers",
        ) from error
    _remove_all_but(state_file)


def _remove_unnamed(state_file: Path) -> None:
    """Remove a state, but for one that the manifest names already: the write failed after that."""
    with suppress(OSError, ValueError):
        manifest = state_file.parent / _MANIFEST
        if not manifest.exists() or json.loads(manifest.read_text())["state"] != state_file.name:
            state_file.unlink()


def _remove_all_but(state_file: Path) -> None:
    """Remove earlier states and what killed processes left; the disk has the manifest of this one."""
    with suppress(OSError):  # the new state is complete, and the next one tries again
        for other in (*state_file.parent.glob("state-*-*.pt"), *state_file.parent.glob("state-*-*.pt.*.part")):
            if other != state_file:
                other.unlink(missing_ok=True)
        files.remove_partials(state_file.parent / _MANIFEST)


def is_complete(path: Path) -> bool:
    """Whether a state was ever written to the end."""
    return (path / _MANIFEST).is_file()


def read(path: Path) -> dict[str, Any]:
    """The state of a folder, on the CPU.

    Raises:
        RunFolderError: the folder is missing, damaged, or not dither's.
    """
    if not is_complete(path):
        raise RunFolderError(
            f"{path} is not a dither checkpoint: it has no {_MANIFEST}.", fix="pass the folder that `save` wrote"
        )
    with reading(path):
        manifest = json.loads((path / _MANIFEST).read_text())
        if manifest["format"] != _FORMAT:
            raise RunFolderError(
                f"{path} has format {manifest['format']!r}; this dither reads {_FORMAT!r}.",
                fix="resume with the dither that wrote it",
            )
        file = path / Path(manifest["state"]).name
        if files.sha256(file) != manifest["sha256"]:
            raise RunFolderError(
                f"{file} is damaged: its SHA-256 is not the manifest's.", fix="restore the folder from a copy"
            )
        state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
        return state


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what a damaged file raises into an error that says so; dither's own errors pass."""
    try:
        yield
    except DitherError:
        raise
    except Exception as error:  # a damaged file fails in as many ways as there are readers
        raise RunFolderError(
            f"{path} cannot be read as this run's checkpoint: {type(error).__name__}: {error}",
            fix="restore the folder from a copy, or start a new run",
        ) from error


def state_of(training: PrivateTraining) -> dict[str, Any]:
    """Everything that a run needs to go on: neither the key of the noise nor any example."""
    return {
        "settings": {
            "expected_batch_size": training.sampler.expected_batch_size,
            "steps": training.steps,
            "max_grad_norm": training.max_grad_norm,
            "delta": training.delta,
            "noise_multiplier": training.noise_multiplier,
            "microbatch_size": training._microbatch_size,
            "clipping": training.clipping,
            "seed": training.seed,
            "ema_decay": training.ema_decay,
            "verify_first_batch": training.first_batches.wanted,
            **training._engine,
        },
        "target_epsilon": training.target_epsilon,
        "fingerprint": fingerprint(training.parameters, training.optimizer, training.scheduler),
        "prior": Ledger(training.prior).to_json(),
        "ledger": training.ledger.to_json(),
        "resumed": training.resumed,
        "dataset_size": training.sampler.dataset_size,
        "current_microbatch_size": training.microbatches.current,
        "model": training.model.state_dict(),
        "optimizer": training.optimizer.state_dict(),
        "scheduler": None if training.scheduler is None else training.scheduler.state_dict(),
        "ema": training.ema,
        "verification": training.first_batches.found,
    }


def restore(training: PrivateTraining, state: Mapping[str, Any], path: Path) -> None:
    """Put a saved state into a run that was built from the same settings.

    Raises:
        RunFolderError: it is of another model, optimizer or scheduler.
        LedgerError: its ledger does not begin with what was released before the run.
    """
    given = fingerprint(training.parameters, training.optimizer, training.scheduler)
    check_fingerprint(state["fingerprint"], given, path)
    ledger = Ledger.from_json(state["ledger"])
    if ledger.events[: len(training.prior)] != training.prior:
        raise LedgerError(
            f"{path} has lost a release that its run was planned with.", fix="restore the folder from a copy"
        )
    training.model.load_state_dict(state["model"])
    training.optimizer.load_state_dict(state["optimizer"])
    if training.scheduler is not None:
        training.scheduler.load_state_dict(state["scheduler"])
    if training.ema is not None:
        for name, average in training.ema.items():
            average.copy_(state["ema"][name])
    training.target_epsilon = state["target_epsilon"]
    training.ledger = ledger
    training.resumed = state["resumed"] + 1
    training.microbatches.current = state["current_microbatch_size"]
    training.first_batches.found = dict(state.get("verification", training.first_batches.found))


def fingerprint(parameters: Mapping[str, Tensor], optimizer: object, scheduler: object) -> dict[str, Any]:
    """What must be the same for a state to fit: parameter shapes and the kinds of optimizer and scheduler."""
    return {
        "parameters": {name: list(parameter.shape) for name, parameter in parameters.items()},
        "optimizer": type(optimizer).__name__,
        "scheduler": None if scheduler is None else type(scheduler).__name__,
    }


def check_fingerprint(saved: Mapping[str, Any], given: Mapping[str, Any], path: Path) -> None:
    """Compare fingerprints.

    Raises:
        RunFolderError: they differ.
    """
    for kind in ("optimizer", "scheduler"):
        if saved[kind] != given[kind]:
            raise RunFolderError(
                f"{path} was saved with {kind} {saved[kind]}; it is resumed with {given[kind]}.",
                fix=f"build the same {kind} and pass it to resume",
            )
    for name in {**saved["parameters"], **given["parameters"]}:
        before, now = saved["parameters"].get(name), given["parameters"].get(name)
        if before != now:
            raise RunFolderError(
                f"{path} is of another model: trainable parameter {name} has shape {before} there and {now} here.",
                fix="build the model as for the saved run, with the same parameters trainable",
            )
