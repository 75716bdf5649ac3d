"""What a run folder holds, read for the report; whatever is missing is None or empty, as in a run that was cut."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from dither.errors import CertificateError, RunFolderError
from dither.report.checking import contradictions, faults_of_form, read_certificate
from dither.telemetry.curves import Points, read_curves


@dataclass(frozen=True)
class Grid:
    """A picture of samples: after how many steps, or None for the last one."""

    file: Path
    step: int | None


@dataclass(frozen=True)
class Contents:
    """A run folder's contents.

    Attributes:
        path: the folder.
        run: run.json.
        certificate: certificate.json; None before a session has ended.
        config: config.yaml.
        curves: by name, (step, value).
        grids: samples through training, the last one last.
        evaluation: evaluation.json, if `dither evaluate` wrote it.
        services: other places that values were sent to.
    """

    path: Path
    run: Mapping[str, Any]
    certificate: Mapping[str, Any] | None
    config: Mapping[str, Any]
    curves: Mapping[str, Points]
    grids: tuple[Grid, ...]
    evaluation: Mapping[str, Any] | None
    services: tuple[str, ...]

    @property
    def name(self) -> str:
        """Of the folder, whatever path it was given by."""
        return self.path.resolve().name

    @cached_property
    def contradictions(self) -> list[str]:
        """Where the certificate states what its own figures or its ledger deny; epsilon is computed again for it."""
        return [] if self.certificate is None else contradictions(self.certificate)

    @property
    def options(self) -> str:
        """The options of the run as text."""
        return yaml.safe_dump(dict(self.config), sort_keys=False)

    @property
    def without_folders(self) -> Contents:
        """The same without the folders of its paths, which name people and machines."""
        return replace(self, certificate=_without_folders(self.certificate), config=_without_folders(self.config))


def read_contents(path: Path) -> Contents:
    """Read a run folder.

    Raises:
        RunFolderError: no folder there, not dither's, or a file of it is damaged.
    """
    if not path.is_dir():
        raise RunFolderError(f"{path} is not a folder", fix="give the folder that `dither train` named when it began")
    run = _json(path / "run.json")
    if run is None:
        raise RunFolderError(
            f"{path} has no run.json, so dither did not write it", fix="give a run folder of `dither train`"
        )
    return Contents(
        path=path,
        run=run,
        certificate=_certificate(path / "certificate.json"),
        config=_yaml(path / "config.yaml"),
        curves=read_curves(path / "tensorboard"),
        grids=_grids(path),
        evaluation=_json(path / "evaluation.json"),
        services=tuple(_json(path / "telemetry.json") or ()),
    )


_PATHS = {"path", "from", "output", "resume"}
"""Options that are paths, also where they begin at no root; those of the Hugging Face Hub begin with hf:."""


def _without_folders(node: Any, name: str = "") -> Any:
    """Options whose paths are their last names alone."""
    if isinstance(node, dict):
        return {key: _without_folders(value, str(key).rpartition(".")[2]) for key, value in node.items()}
    if isinstance(node, list):
        return [_without_folders(value, name) for value in node]
    if not isinstance(node, str) or node.startswith("hf:"):
        return node
    *folders, last = re.split(r"[/\\]+", node.rstrip("/\\"))
    is_path = name in _PATHS or re.match(r"[/~\\]|\.\.|[A-Za-z]:[/\\]", node) is not None
    return f".../{last}" if folders and is_path else node


def _grids(path: Path) -> tuple[Grid, ...]:
    named = ((file, re.fullmatch(r"step-(\d+)", file.stem)) for file in (path / "samples").glob("step-*.png"))
    grids = sorted((Grid(file, int(found[1])) for file, found in named if found), key=lambda grid: grid.step or 0)
    grids = [grid for grid in grids if grid.file.is_file()]
    last = path / "samples.png"
    return (*grids, Grid(last, None)) if last.is_file() else tuple(grids)


def _certificate(file: Path) -> dict[str, Any] | None:
    if not file.is_file():
        return None
    try:
        found = read_certificate(file)
    except CertificateError as error:
        raise _damaged(file, error.what) from error
    faults = faults_of_form(found)
    if faults:
        more = f", and {len(faults) - 1} more" if len(faults) > 1 else ""
        raise _damaged(file, f"{faults[0]}{more}")
    return _mapping(found, file)


def _json(file: Path) -> dict[str, Any] | None:
    if not file.is_file():
        return None
    try:
        return _mapping(json.loads(file.read_text()), file)
    except (OSError, ValueError) as error:
        raise _damaged(file, error) from error


def _yaml(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        found = _mapping(yaml.safe_load(file.read_text()), file)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise _damaged(file, error) from error
    for group in ("recipe", "performance", "unet", "finetune"):
        if found.get(group) is not None:
            _mapping(found[group], file)
    return found


def _mapping(value: object, file: Path) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _damaged(file, "it is not a mapping")
    return value


def _damaged(file: Path, why: object) -> RunFolderError:
    return RunFolderError(f"{file} is damaged: {why}", fix="restore it from a copy")
