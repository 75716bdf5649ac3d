"""Private fine-tuning of a public DiT: fitted to other images and classes, and which parameters are trained.

Few trainable parameters mean little noise: its norm grows with the root of their number.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dither.diffusion.checkpoints import architecture
from dither.diffusion.dit import DiT
from dither.errors import ConfigurationError

Mode = Literal["full", "lora", "attention", "biases"]

_LABELS = "y_embedder.embedding_table.weight"
_ROWS = ("final_layer.linear.weight", "final_layer.linear.bias")


@dataclass(frozen=True)
class FineTuning:
    """Which parameters the private steps train. In every mode the table of labels is among them.

    Args:
        mode: "full"; "attention" (Lyu et al. 2023, DP-LDM); "biases" (Bu et al. 2022, DP-BiTFiT); or "lora": low-rank
            updates beside frozen matrices (Hu et al. 2022).
        rank: of an update, for "lora".
        alpha: an update is scaled by alpha / rank; None is the rank. Not 0, and finite.
        targets: ends of the names of the layers that get one.
    """

    mode: Mode = "full"
    rank: int = 8
    alpha: float | None = None
    targets: tuple[str, ...] = ("attn.qkv", "attn.proj")


def choose_parameters(model: nn.Module, finetuning: FineTuning) -> None:
    """Leave requires_grad on what is to be trained; "lora" changes the model's layers in place.

    Raises:
        ConfigurationError: the mode does not go with the model, alpha is 0 or not finite, a target is no layer that can
            have an update, or PEFT is not installed.
    """
    if finetuning.mode == "full":
        return
    if not isinstance(model, DiT):
        raise ConfigurationError(
            f"--finetune.mode {finetuning.mode} is for a DiT, the model is a {type(model).__name__}", fix="use full"
        )
    if finetuning.mode == "lora":
        _inject(model, finetuning)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name == _LABELS or _is_trained(name, finetuning.mode))


def merge(model: DiT) -> None:
    """Add low-rank updates to their matrices, in place: a plain DiT again, with the same outputs."""
    for name, module in list(model.named_modules()):
        if hasattr(module, "lora_A"):
            layer: Any = module
            layer.merge()
            owner, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(owner), attribute, layer.get_base_layer())


def adapt(model: DiT, input_size: int, in_channels: int, num_classes: int, *, hides_labels: bool) -> DiT:
    """Fit a public DiT to images of another side and to other classes.

    Positions are computed for the new side. If the number of classes differs, each new class begins as the row for "no
    label", or, where the model has none, as the mean of its classes. Channels of a learned sigma are left out: private
    training has no use for them.

    Args:
        model: left as it is.
        input_size: image side; a multiple of the model's patch.
        in_channels: channels of the images; the model's.
        num_classes: labels run from 0 to `num_classes - 1`.
        hides_labels: whether labels are dropped in training, so that "no label" needs a row.

    Raises:
        ConfigurationError: the images do not fit the model.
    """
    before = architecture(model)
    if in_channels != model.in_channels:
        raise ConfigurationError(
            f"the images have {in_channels} channels, the checkpoint {model.in_channels}",
            fix="published DiTs are trained on latents of 4 channels: encode the images first",
        )
    if before["position"] == "learned" and input_size != model.input_size:
        raise ConfigurationError(
            f"the checkpoint has learned positions for a side of {model.input_size}, the images {input_size}",
            fix=f"resize the images to {model.input_size}",
        )
    had_null = before["class_dropout_prob"] > 0
    dropout = 0.1 if had_null or hides_labels else 0.0
    settings = {"input_size": input_size, "num_classes": num_classes, "learn_sigma": False}
    fitted = DiT(**{**before, **settings, "class_dropout_prob": dropout})
    weights = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    if before["position"] == "sincos":
        weights["pos_embed"] = fitted.pos_embed.detach()
    if model.learn_sigma:
        for name in _ROWS:
            weights[name] = _without_sigma(weights[name], model)
    weights[_LABELS] = _fitted_table(weights[_LABELS], model.num_classes, num_classes, dropout > 0)
    fitted.load_state_dict(weights)
    return fitted


def trainable(model: nn.Module) -> list[str]:
    """Names of the parameters that are trained."""
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def all_but_updates(model: nn.Module, mode: Mode) -> list[nn.Parameter]:
    """The parameters that ordinary training changes before private steps of this mode.

    All of them, but fixed positions and low-rank updates, which begin at zero.
    """
    if mode == "full" or not isinstance(model, DiT):
        return [parameter for parameter in model.parameters() if parameter.requires_grad]
    fixed = model.position == "sincos"
    return [
        parameter
        for name, parameter in model.named_parameters()
        if ".lora_" not in name and not (fixed and name == "pos_embed")
    ]


def _is_trained(name: str, mode: Mode) -> bool:
    if mode == "lora":
        return ".lora_" in name
    return ".attn." in name if mode == "attention" else name.endswith("bias")


def _inject(model: DiT, finetuning: FineTuning) -> None:
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ModuleNotFoundError as error:
        raise ConfigurationError(
            f"--finetune.mode lora needs the package {error.name}", fix="pip install 'dither[finetune]'"
        ) from error
    alpha = finetuning.rank if finetuning.alpha is None else finetuning.alpha
    if finetuning.alpha is not None and not 0 < abs(alpha) < math.inf:
        raise ConfigurationError(
            f"--finetune.alpha {alpha} scales every update to nothing or beyond", fix="leave it out, for the rank"
        )
    layers = sorted({".".join(n.split(".")[-2:]) for n, m in model.named_modules() if isinstance(m, nn.Linear)})
    for target in finetuning.targets:
        found = [name for name, _ in model.named_modules() if f".{name}".endswith(f".{target}")]
        if not found or any(f"{name}.weight" == _LABELS for name in found):
            why = "is the table of labels, which is trained itself" if found else "ends no layer's name"
            raise ConfigurationError(f"--finetune.targets: {target!r} {why}", fix=f"of these: {', '.join(layers)}")
    try:
        inject_adapter_in_model(
            LoraConfig(r=finetuning.rank, lora_alpha=alpha, target_modules=list(finetuning.targets)), model
        )
    except ValueError as error:
        raise ConfigurationError(
            f"PEFT makes no LoRA of rank {finetuning.rank} for {', '.join(finetuning.targets)}: {error}",
            fix=f"a rank above 0, and of these layers: {', '.join(layers)}",
        ) from error


def _without_sigma(rows: Tensor, model: DiT) -> Tensor:
    """Of the final layer's rows (p * p * 2 C, ...), the channels that predict the noise: (p * p * C, ...)."""
    cells = rows.unflatten(0, (model.patch_size**2, model.out_channels))
    kept: Tensor = cells[:, : model.in_channels].flatten(0, 1)
    return kept


def _fitted_table(table: Tensor, had: int, wanted: int, null_row: bool) -> Tensor:
    """Rows of `wanted` classes, and one for "no label" if `null_row`."""
    null = table[had:] if len(table) > had else table.mean(0, keepdim=True)
    classes = table[:had] if had == wanted else null.expand(wanted, -1)
    return torch.cat([classes, null]) if null_row else classes.clone()
