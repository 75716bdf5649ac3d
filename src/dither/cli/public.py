"""What of a run is public and did not begin with it: a checkpoint, data for pretraining; for the certificate.

model.json     arguments of the DiT, where a checkpoint gave them and not the recipe
public.json    what was taken as public, and which parameters the private steps train
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dither.cli.run_folder import RunFolder
from dither.errors import RunFolderError
from dither.files import replacing, sha256

if TYPE_CHECKING:
    from torch import nn

ARCHITECTURE, PUBLIC = "model.json", "public.json"
ON_WHOSE_WORD = "on the word of whoever started the run"


def read_facts(folder: RunFolder, name: str) -> dict[str, Any]:
    """A file of facts; empty if the run has none.

    Raises:
        RunFolderError: damaged.
    """
    file = folder.path / name
    if not file.is_file():
        return {}
    try:
        return dict(json.loads(file.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise RunFolderError(f"{file} is damaged: {error}", fix="restore it from a copy, or train again") from error


def add_facts(folder: RunFolder, name: str, facts: Mapping[str, Any]) -> None:
    """Write facts beside those that are there, which a crash leaves."""
    text = json.dumps({**read_facts(folder, name), **facts}, indent=2)
    with replacing(folder.path / name) as partial:
        partial.write_text(text + "\n")


def certificate_part(folder: RunFolder) -> dict[str, Any]:
    """What the certificate says of public data; nothing if a run has none.

    A certificate is handed out, and folders name people and machines: of a path it has the last name.
    """
    from dither.data.reading import HUB

    facts = read_facts(folder, PUBLIC)
    for name in ("checkpoint", "pretraining"):
        if (source := facts.get(name)) and not source["path"].startswith(HUB):
            source["path"] = Path(source["path"]).name
    return {"public": facts} if facts else {}


def trained_parameters_facts(model: nn.Module, mode: str) -> dict[str, Any]:
    """Which parameters the private steps train."""
    from dither.diffusion.finetuning import trainable

    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    names = trainable(model)
    return {
        "mode": mode,
        "trained_numbers": sum(sizes[name] for name in names),
        "all_numbers": sum(sizes.values()),
        "parameters": names,
    }


def checkpoint_facts(path: Path) -> dict[str, Any]:
    """What a checkpoint is: its path, each weight file's SHA-256, and the claim if dither trained it."""
    facts: dict[str, Any] = {"path": str(path.resolve()), "taken_as_public": ON_WHOSE_WORD}
    files = [path] if path.is_file() else sorted([*path.glob("**/*.safetensors"), *path.glob("**/*.bin")])
    facts["sha256"] = {str(file.relative_to(path.parent)): sha256(file) for file in files}
    if (path / "run.json").is_file() and (path / "certificate.json").is_file():
        claim = json.loads((path / "certificate.json").read_text())
        facts["certificate"] = {name: claim.get(name) for name in ("private", "epsilon", "delta", "dataset_size")}
    return facts


def files_digest(path: Path) -> str:
    """SHA-256 of a file; of a folder, that of what `sha256sum` prints of its files, sorted by their paths in it."""
    if path.is_file():
        return sha256(path)
    files = sorted(os.fsencode(file.relative_to(path)) for file in path.rglob("*") if file.is_file())
    digest = hashlib.sha256()
    for name in files:
        digest.update(sha256(path / os.fsdecode(name)).encode() + b"  " + name + b"\n")
    return digest.hexdigest()
