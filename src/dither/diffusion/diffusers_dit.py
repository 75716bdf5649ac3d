"""dither's DiT as diffusers' `DiTTransformer2DModel`, and back: the same weights under other names.

diffusers' model differs in four places. Its timestep frequencies are spaced otherwise (`frequency_shift` 1); its second
norms have an epsilon of their own; each block holds a copy of the embedders; its label table always has a row for "no
label".
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dither.diffusion.checkpoints import load_weights
from dither.diffusion.dit import DiT
from dither.diffusion.embeddings import position_sinusoids
from dither.errors import CheckpointError, ConfigurationError, reason_of

PIPELINE_CLASSES = 1000
"""`DiTPipeline` takes label 1000 for "no label", whatever the model's table."""

_SHARED = {
    "t_embedder.mlp.0": "norm1.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "norm1.emb.timestep_embedder.linear_2",
}
_BLOCK = {
    "adaLN_modulation.1": "norm1.linear",
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
}
_OUTER = {
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}
_LABELS, _THEIR_LABELS = "y_embedder.embedding_table.weight", "norm1.emb.class_embedder.embedding_table.weight"
_REQUIRED = {
    "norm_type": "ada_norm_zero",
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "norm_elementwise_affine": False,
    "dropout": 0.0,
}


def to_diffusers(model: DiT, *, approximate: bool = False) -> Any:
    """Build the `DiTTransformer2DModel` with a DiT's weights, and so the same outputs.

    Its label table is filled up to 1000 classes with copies of the row for "no label", so that guidance works in
    `DiTPipeline`. A model without that row gets zeros for it, which nothing was trained with: sample without guidance.

    Args:
        model: any DiT with fixed positions and `mlp_ratio` 4.
        approximate: also take a model of the published timestep frequencies, which diffusers spaces otherwise; the
            outputs then differ, as those of the published weights in diffusers do.

    Raises:
        ConfigurationError: diffusers has no such model.
    """
    from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel

    _check_ours(model, approximate)
    block: Any = model.blocks[0]
    width, heads = model.pos_embed.shape[-1], block.attn.num_heads
    theirs = DiTTransformer2DModel(
        num_attention_heads=heads,
        attention_head_dim=width // heads,
        in_channels=model.in_channels,
        out_channels=model.out_channels,
        num_layers=len(model.blocks),
        sample_size=model.input_size,
        patch_size=model.patch_size,
        num_embeds_ada_norm=max(model.num_classes, PIPELINE_CLASSES),
        norm_eps=block.norm2.eps,
    )
    theirs.load_state_dict(_their_weights(model))
    return theirs.eval()


def load_diffusers(folder: Path) -> DiT:
    """Build the DiT of a folder that diffusers' `save_pretrained` wrote.

    Classes at the end of the label table that are copies of the row for "no label" are left out again.

    Args:
        folder: of a `DiTTransformer2DModel`, or of a pipeline with one in `transformer/`.

    Raises:
        CheckpointError: no such folder, or a model that is not a DiT as published.
    """
    from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel

    folder = folder / "transformer" if (folder / "transformer").is_dir() else folder
    try:
        theirs, info = DiTTransformer2DModel.from_pretrained(
            str(folder),
            local_files_only=True,
            low_cpu_mem_usage=False,
            torch_dtype=torch.float32,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, NotImplementedError) as error:
        raise CheckpointError(
            f"{folder} holds no DiTTransformer2DModel: {reason_of(error)}",
            fix="give the folder that save_pretrained wrote, or a .pt in the published layout",
        ) from error
    if info["missing_keys"]:  # diffusers leaves these at random and only warns
        raise CheckpointError(
            f"{folder} has no weights for {info['missing_keys'][0]}", fix="restore the folder from a copy"
        )
    return from_diffusers(theirs, folder)


def from_diffusers(theirs: Any, where: Path = Path("the model")) -> DiT:
    """Build the DiT with the weights, and so the outputs, of a `DiTTransformer2DModel`.

    Args:
        theirs: the model of diffusers.
        where: what error messages call it.

    Raises:
        CheckpointError: it is not a DiT as published.
    """
    config = theirs.config
    for name, value in _REQUIRED.items():
        if getattr(config, name) != value:
            raise CheckpointError(
                f"{where} has {name} {getattr(config, name)!r}; a DiT has {value!r}",
                fix="train it inside a class of yours: --model",
            )
    if theirs.out_channels not in (config.in_channels, 2 * config.in_channels):
        raise CheckpointError(
            f"{where} makes {theirs.out_channels} channels of {config.in_channels}", fix="give a DiT: as many, or twice"
        )
    weights = _our_weights(theirs, where)
    table = _without_copies(weights[_LABELS])
    model = DiT(
        input_size=config.sample_size,
        patch_size=config.patch_size,
        in_channels=config.in_channels,
        hidden_size=theirs.inner_dim,
        depth=config.num_layers,
        num_heads=config.num_attention_heads,
        num_classes=len(table) - 1,
        learn_sigma=theirs.out_channels == 2 * config.in_channels,
        frequency_shift=1,
        norm2_eps=config.norm_eps,
    )
    load_weights(model, {**weights, _LABELS: table, "pos_embed": model.pos_embed.detach()}, where)
    return model


def _check_ours(model: DiT, approximate: bool) -> None:
    block: Any = model.blocks[0]
    width, inner = model.pos_embed.shape[-1], block.mlp.fc1.out_features
    if inner != 4 * width:
        raise ConfigurationError(
            f"the perceptrons are {inner} wide; diffusers' DiT has 4 x {width}", fix="export in the published layout"
        )
    fixed = position_sinusoids(width, model.x_embedder.grid_size)
    if not torch.allclose(model.pos_embed.detach().cpu().float(), fixed, atol=1e-5):
        raise ConfigurationError(
            "the positions are learned; diffusers' DiT has fixed ones", fix="train with position='sincos'"
        )
    if model.t_embedder.frequency_shift != 1 and not approximate:
        raise ConfigurationError(
            "the model has the published timestep frequencies, and diffusers' DiT others: its outputs would differ",
            fix="train with --recipe.timestep_frequencies diffusers, or accept the difference with --approximate",
        )


def _their_weights(model: DiT) -> dict[str, Tensor]:
    ours = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    out = _renamed(ours, _OUTER, "", "")
    for index in range(len(model.blocks)):
        mine, prefix = f"blocks.{index}.", f"transformer_blocks.{index}."
        out |= _renamed(ours, _SHARED, "", prefix) | _renamed(ours, _BLOCK, mine, prefix)
        out[prefix + _THEIR_LABELS] = _with_copies(ours[_LABELS], model.num_classes)
        for kind in ("weight", "bias"):
            for name, part in zip("qkv", ours[f"{mine}attn.qkv.{kind}"].chunk(3), strict=True):
                out[f"{prefix}attn1.to_{name}.{kind}"] = part
    return out


def _our_weights(theirs: Any, where: Path) -> dict[str, Tensor]:
    """Their weights under our names; refused where the blocks' embedders are not copies of each other."""
    given = {name: tensor.detach() for name, tensor in theirs.state_dict().items()}
    out = _renamed(given, {new: old for old, new in _OUTER.items()}, "", "")
    for index in range(theirs.config.num_layers):
        prefix, mine = f"transformer_blocks.{index}.", f"blocks.{index}."
        shared = _renamed(given, {new: old for old, new in _SHARED.items()}, prefix, "")
        shared[_LABELS] = given[prefix + _THEIR_LABELS]
        for name, tensor in shared.items():
            if not torch.equal(out.setdefault(name, tensor), tensor):
                raise CheckpointError(
                    f"{where}: blocks 0 and {index} have different {name}; a DiT has one for all blocks",
                    fix="train it inside a class of yours that returns its .sample: --model",
                )
        out |= _renamed(given, {new: old for old, new in _BLOCK.items()}, prefix, mine)
        for kind in ("weight", "bias"):
            parts = [given[f"{prefix}attn1.to_{name}.{kind}"] for name in "qkv"]
            out[f"{mine}attn.qkv.{kind}"] = torch.cat(parts)
    return out


def _renamed(weights: dict[str, Tensor], names: dict[str, str], before: str, after: str) -> dict[str, Tensor]:
    return {
        f"{after}{new}.{kind}": weights[f"{before}{old}.{kind}"]
        for old, new in names.items()
        for kind in ("weight", "bias")
    }


def _with_copies(table: Tensor, num_classes: int) -> Tensor:
    """Rows of the classes, then copies of the row for "no label", at least up to `PIPELINE_CLASSES`."""
    null = table[num_classes:] if len(table) > num_classes else torch.zeros_like(table[:1])
    return torch.cat([table[:num_classes], null.expand(max(1, PIPELINE_CLASSES + 1 - num_classes), -1)])


def _without_copies(table: Tensor) -> Tensor:
    """The rows up to the first of the copies at the end."""
    same = (table == table[-1]).all(1).tolist()
    end = len(table)
    while end > 2 and same[end - 2]:
        end -= 1
    return table[:end]
