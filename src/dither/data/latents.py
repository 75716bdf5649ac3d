"""Precomputed latents: a safetensors file with latents, labels and where they come from.

latents (N, C, H, W) as the autoencoder's encoder gives them, labels (N,), and metadata: format, scaling_factor,
shift_factor, vae, class_names (JSON).
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dither.data.checking import Checked, refuse_or_list
from dither.data.image_data import Latents
from dither.errors import DataError

FORMAT = "dither latents 1"

_CHUNK = 4096
_FIX = "write it with dither encode"


@dataclass(frozen=True)
class LatentsFile:
    """What a file of latents holds.

    Args:
        latents: (N, C, H, W), floating point, mapped from the file.
        labels: (N,).
        source: the autoencoder.
        class_names: None if the file has none.
    """

    latents: Tensor
    labels: np.ndarray[Any, Any]
    source: Latents
    class_names: tuple[str, ...] | None


@dataclass(frozen=True)
class Scaled:
    """Latents, shifted and scaled by the autoencoder's public constants when they are asked for.

    Args:
        latents: (N, C, H, W).
        source: the autoencoder.
        chosen: (n,) those that are examples.
    """

    latents: Tensor
    source: Latents
    chosen: Tensor

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.chosen)

    def take(self, indices: Tensor) -> Tensor:
        """Latents (b, C, H, W) at indices (b,), float32."""
        latents = self.latents[self.chosen[indices]].float()
        return (latents - self.source.shift_factor) * self.source.scaling_factor


def save_latents(file: Path, latents: Tensor, labels: Tensor, source: Latents, class_names: tuple[str, ...]) -> None:
    """Write a file of latents.

    Args:
        file: is overwritten.
        latents: (N, C, H, W), before shift and scale.
        labels: (N,) int64.
        source: the autoencoder.
        class_names: one for each label.
    """
    from safetensors.torch import save_file

    metadata = {
        "format": FORMAT,
        "vae": source.vae,
        "scaling_factor": repr(source.scaling_factor),
        "shift_factor": repr(source.shift_factor),
        "class_names": json.dumps(class_names),
    }
    save_file({"latents": latents.contiguous(), "labels": labels.contiguous()}, str(file), metadata)


def open_latents(file: Path) -> LatentsFile:
    """Open a file of latents; they stay on disk until they are asked for.

    Raises:
        DataError: not such a file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(file), "pt") as saved:
            metadata, keys = saved.metadata() or {}, set(saved.keys())
            missing = [key for key in ("latents", "labels") if key not in keys]
            if missing:
                raise DataError(f"{file} has {', '.join(sorted(keys)) or 'nothing'}, but no {missing[0]}", fix=_FIX)
            latents, labels = saved.get_tensor("latents"), saved.get_tensor("labels")
    except (SafetensorError, OSError) as error:
        raise DataError(f"{file} cannot be read: {error}", fix=_FIX) from error
    if latents.dim() != 4 or not latents.is_floating_point() or latents.shape[2] != latents.shape[3]:
        raise DataError(
            f"{file} has latents of shape {tuple(latents.shape)} and type {latents.dtype}; wanted are (N, C, H, H) in "
            "floating point",
            fix=_FIX,
        )
    if not latents.numel():
        raise DataError(f"{file} has no latents", fix="encode at least one image")
    return LatentsFile(latents, labels.numpy(), _source(metadata, file), _names(metadata, file))


def check_latents(file: LatentsFile, *, where: object, skip_broken: bool = False) -> Checked:
    """Look at every latent once: each must be finite.

    Raises:
        BrokenImagesError: some are not and skip_broken is not set, or no others are left.
    """
    finite = torch.cat([chunk.isfinite().flatten(1).all(1) for chunk in file.latents.split(_CHUNK)])
    broken = dict.fromkeys((~finite).nonzero().flatten().tolist(), "values that are not finite")
    names = [f"example {place}" for place in range(len(finite))]
    left_out = refuse_or_list(broken, names, where, skip_broken)
    kept = finite.nonzero().flatten()
    _, channels, side, _ = file.latents.shape
    return Checked(Scaled(file.latents, file.source, kept), kept, channels, side, left_out)


def _source(metadata: dict[str, str], file: Path) -> Latents:
    try:
        scale, shift = float(metadata["scaling_factor"]), float(metadata.get("shift_factor", "0"))
    except (KeyError, ValueError):
        raise DataError(
            f"{file} does not state its autoencoder's scaling_factor: {metadata.get('scaling_factor')!r}",
            fix=f"{_FIX}, or add it to the file's metadata: a public constant, never measured on the data",
        ) from None
    if not (math.isfinite(scale) and math.isfinite(shift) and scale != 0):
        raise DataError(f"{file} states scaling_factor {scale} and shift_factor {shift}", fix=_FIX)
    return Latents(metadata.get("vae", "unknown"), scale, shift)


def _names(metadata: dict[str, str], file: Path) -> tuple[str, ...] | None:
    if "class_names" not in metadata:
        return None
    try:
        names = json.loads(metadata["class_names"])
    except ValueError as error:
        raise DataError(f"{file} has class_names that are no JSON: {error}", fix=_FIX) from error
    if not isinstance(names, list):
        raise DataError(f"{file} has class_names that are no list", fix=_FIX)
    return tuple(map(str, names))
