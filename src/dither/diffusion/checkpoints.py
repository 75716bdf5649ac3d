"""DiTs on disk: the published key layout (facebookresearch/DiT), and the door to every layout that dither reads.

Shapes: D hidden width, C channels, p patch side, T tokens, H image side.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dither.diffusion.dit import HEADS, DiT
from dither.diffusion.embeddings import position_sinusoids
from dither.errors import CheckpointError, OutputPathError, reason_of

__all__ = ["load_dit", "save_dit"]

_LABELS = "y_embedder.embedding_table.weight"


def load_dit(path: str | Path, *, num_heads: int | None = None, input_size: int | None = None) -> DiT:
    """Build the DiT of a checkpoint, with its weights.

    Args:
        path: a file in the published layout (.pt, .pth, .safetensors), or a folder of diffusers: a
            `DiTTransformer2DModel`, or a pipeline with one in `transformer/`.
        num_heads: attention heads, where the file's width is not a published one.
        input_size: image side, where the file has no `pos_embed`; None is then the published 32.

    Raises:
        CheckpointError: missing, damaged, or of another architecture.
    """
    path = Path(path)
    if path.is_dir():
        from dither.diffusion.diffusers_dit import load_diffusers

        return load_diffusers(path)
    weights = read_weights(path)
    try:
        model = DiT(**_settings_of(weights, path, num_heads, input_size))
    except KeyError as error:
        raise CheckpointError(
            f"{path} has no {error.args[0]}: it is not in the published layout of DiT",
            fix="give a DiT: its .pt, or the folder of a diffusers DiTTransformer2DModel",
        ) from error
    weights.setdefault("pos_embed", model.pos_embed.detach())
    load_weights(model, weights, path)
    return model


def save_dit(path: Path, model: DiT, ema: Mapping[str, Tensor] | None = None) -> None:
    """Write weights in the published layout: {"model": raw weights, "ema": their average}, as DiT's own scripts do.

    Args:
        path: of the file, usually .pt.
        model: whose weights are written.
        ema: a state dict; None takes the model's.

    Raises:
        OutputPathError: the file cannot be written.
    """
    raw = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    averaged = raw if ema is None else {name: tensor.detach().cpu() for name, tensor in ema.items()}
    try:
        torch.save({"model": raw, "ema": averaged}, path)
    except (OSError, RuntimeError) as error:
        raise OutputPathError(f"{path} cannot be written: {error}", fix="give a path you may write") from error


def read_weights(path: Path) -> dict[str, Tensor]:
    """The state dict in a file; of {"ema": ..., "model": ...} the first that is there.

    Nothing in the file is run: only tensors, plain values and the published files' `argparse.Namespace` are read.

    Raises:
        CheckpointError: missing, damaged, or without tensors.
    """
    if not path.is_file():
        raise CheckpointError(f"there is no {path}", fix="give a .pt or .safetensors, or a folder of diffusers")
    try:
        content = _read(path)
    except Exception as error:  # a damaged file fails in as many ways as there are readers
        raise CheckpointError(
            f"{path} cannot be read: {reason_of(error)}", fix="give a file of tensors: .pt or .safetensors"
        ) from error
    for part in ("ema", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(part), Mapping):
            content = content[part]
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(f"{path} holds no state dict", fix="save model.state_dict(), alone or as 'ema'")
    return dict(content)


def load_weights(model: torch.nn.Module, weights: Mapping[str, Tensor], path: Path) -> None:
    """Put weights into a model that must have exactly these.

    Raises:
        CheckpointError: names or shapes differ.
    """
    try:
        model.load_state_dict(dict(weights))
    except RuntimeError as error:
        raise CheckpointError(
            f"{path} does not fit a DiT of its own sizes: {str(error).splitlines()[-1].strip()}",
            fix="give a checkpoint of an unchanged DiT",
        ) from error


def architecture(model: DiT) -> dict[str, Any]:
    """The arguments that build such a DiT again, of plain values; ask before anything is injected into it."""
    table = model.y_embedder.embedding_table
    block: Any = model.blocks[0]
    width = model.pos_embed.shape[-1]
    return {
        "input_size": model.input_size,
        "patch_size": model.patch_size,
        "in_channels": model.in_channels,
        "hidden_size": width,
        "depth": len(model.blocks),
        "num_heads": block.attn.num_heads,
        "mlp_ratio": _ratio(block.mlp.fc1.out_features, width),
        "class_dropout_prob": model.y_embedder.dropout_prob if table.num_embeddings > model.num_classes else 0.0,
        "num_classes": model.num_classes,
        "learn_sigma": model.learn_sigma,
        "position": model.position,
        "frequency_shift": model.t_embedder.frequency_shift,
        "norm2_eps": block.norm2.eps,
    }


def _read(path: Path) -> Any:
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(str(path))
        except SafetensorError as error:
            raise ValueError(str(error)) from error
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, map_location="cpu", weights_only=True)


def _settings_of(
    weights: Mapping[str, Tensor], path: Path, num_heads: int | None, input_size: int | None
) -> dict[str, Any]:
    """Read a DiT's sizes off the shapes of its weights; the table of labels has a row for "no label", as published."""
    width, channels, side, _ = weights["x_embedder.proj.weight"].shape
    heads = HEADS.get(width) if num_heads is None else num_heads
    if heads is None:
        raise CheckpointError(
            f"{path} has width {width}, which is no published size, and weights do not say the number of heads",
            fix="give load_dit num_heads; or give a run of dither, or a folder of diffusers, which say it",
        )
    table = weights.get("pos_embed")
    if table is not None:
        input_size = math.isqrt(table.shape[1]) * side
    input_size = 32 if input_size is None else input_size
    fixed = table is None or torch.allclose(table.float(), position_sinusoids(width, input_size // side), atol=1e-5)
    return {
        "input_size": input_size,
        "patch_size": side,
        "in_channels": channels,
        "hidden_size": width,
        "depth": 1 + max((int(name.split(".")[1]) for name in weights if name.startswith("blocks.")), default=-1),
        "num_heads": heads,
        "mlp_ratio": _ratio(weights["blocks.0.mlp.fc1.weight"].shape[0], width),
        "num_classes": weights[_LABELS].shape[0] - 1,
        "learn_sigma": weights["final_layer.linear.bias"].shape[0] == 2 * channels * side**2,
        "position": "sincos" if fixed else "learned",
    }


def _ratio(inner: int, width: int) -> float:
    """The `mlp_ratio` that gives back `inner`, also where the division is rounded down."""
    ratio = inner / width
    return ratio if int(width * ratio) == inner else math.nextafter(ratio, math.inf)
