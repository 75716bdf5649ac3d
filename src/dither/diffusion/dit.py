"""Class-conditional diffusion transformer with adaLN-Zero conditioning.

Source: Peebles & Xie 2023, "Scalable Diffusion Models with Transformers", sec. 3. Module names follow
the published state dict, so that published weights load.

Shapes: B examples, C channels, H = W image side, p patch side, T = (H / p)^2 tokens, D hidden width.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dither.diffusion.embeddings import LabelEmbedder, PatchEmbedder, TimestepEmbedder, position_sinusoids
from dither.errors import ConfigurationError

Position = Literal["sincos", "learned"]


class Attention(nn.Module):
    """Multi-head self-attention with one packed projection for queries, keys and values."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        if hidden_size % num_heads:
            raise ConfigurationError(
                f"hidden_size {hidden_size} is not a multiple of num_heads {num_heads}",
                fix="choose num_heads that divides hidden_size",
            )
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (B, T, D) to (B, T, D)."""
        batch, tokens, width = x.shape
        packed = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, width // self.num_heads)
        query, key, value = packed.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(query, key, value)
        out: Tensor = self.proj(mixed.transpose(1, 2).reshape(batch, tokens, width))
        return out


class DiTBlock(nn.Module):
    """Attention and perceptron, each scaled, shifted and gated by the conditioning (adaLN-Zero)."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float, norm2_eps: float = 1e-6) -> None:
        super().__init__()
        inner = int(hidden_size * mlp_ratio)
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(hidden_size, num_heads)
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=norm2_eps)
        self.mlp = nn.Sequential(
            OrderedDict(
                fc1=nn.Linear(hidden_size, inner),
                act=nn.GELU(approximate="tanh"),
                fc2=nn.Linear(inner, hidden_size),
            )
        )
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Map tokens x (B, T, D) under conditioning c (B, D) to (B, T, D)."""
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate_1[:, None] * self.attn(_modulate(self.norm1(x), shift_1, scale_1))
        out: Tensor = x + gate_2[:, None] * self.mlp(_modulate(self.norm2(x), shift_2, scale_2))
        return out


class FinalLayer(nn.Module):
    """Modulated norm and the projection of each token to its patch of pixels."""

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Map tokens (B, T, D) to patches (B, T, p * p * out_channels)."""
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        patches: Tensor = self.linear(_modulate(self.norm_final(x), shift, scale))
        return patches


class DiT(nn.Module):
    """A diffusion transformer: noisy image, timestep and label in; a prediction per pixel out.

    Args:
        input_size: image side in pixels (or latent cells).
        patch_size: patch side; divides `input_size`.
        in_channels: image channels C.
        hidden_size: token width D.
        depth: number of blocks.
        num_heads: attention heads; divides `hidden_size`.
        mlp_ratio: inner width of a block's perceptron, in units of D.
        class_dropout_prob: probability of dropping a label in training; 0 leaves out the "no label" row.
        num_classes: labels run from 0 to `num_classes - 1`.
        learn_sigma: double the output channels; the second half parametrises the reverse variance.
        position: "sincos" is a fixed table, "learned" a trainable one started there.
        label_std: standard deviation of the label table's start; 0.02 as published. About 1 makes a class
            weigh as much as the timestep from the first step on, which few noisy steps need.
        frequency_shift: of the timestep's sinusoids: 0 as published, 1 as diffusers' DiT has it.
        norm2_eps: epsilon of each block's second norm: 1e-6 as published, 1e-5 in diffusers' unless told.

    Raises:
        ConfigurationError: sizes that do not divide each other, or an unknown `position`.
    """

    def __init__(
        self,
        input_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        class_dropout_prob: float = 0.1,
        num_classes: int = 1000,
        learn_sigma: bool = True,
        position: Position = "sincos",
        label_std: float = 0.02,
        frequency_shift: int = 0,
        norm2_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        if position not in ("sincos", "learned"):
            raise ConfigurationError(f"position {position!r} is not known", fix="choose 'sincos' or 'learned'")
        self.input_size, self.in_channels, self.patch_size = input_size, in_channels, patch_size
        self.num_classes, self.learn_sigma = num_classes, learn_sigma
        self.out_channels = in_channels * 2 if learn_sigma else in_channels
        self.x_embedder = PatchEmbedder(input_size, patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size, frequency_shift=frequency_shift)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob)
        self.position = position
        table = position_sinusoids(hidden_size, self.x_embedder.grid_size)
        # A fixed table stays a Parameter, as published, so that optimizers skip it and state dicts hold it.
        self.pos_embed = nn.Parameter(table.to(self.x_embedder.proj.weight.device), requires_grad=position == "learned")
        self.blocks = nn.ModuleList(DiTBlock(hidden_size, num_heads, mlp_ratio, norm2_eps) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size, self.out_channels)
        _initialise(self, label_std)

    def forward(self, x: Tensor, t: Tensor, y: Tensor, drop_label: Tensor | None = None) -> Tensor:
        """Predict from a noisy image.

        Args:
            x: noisy images (B, C, H, W).
            t: timesteps (B,), integer or float.
            y: labels (B,), int64.
            drop_label: (B,) boolean, True where the label is hidden. None draws it once here when
                training and hides nothing otherwise.

        Returns:
            (B, C, H, W), or (B, 2 C, H, W) with `learn_sigma`.

        Raises:
            LabelError: a label outside the model's range.
            ConfigurationError: images of another shape than the model was built for.
        """
        if tuple(x.shape[1:]) != (self.in_channels, self.input_size, self.input_size):
            raise ConfigurationError(
                f"images have shape {tuple(x.shape)}, the model takes "
                f"(B, {self.in_channels}, {self.input_size}, {self.input_size})",
                fix="resize the images or build the model with their input_size and in_channels",
            )
        tokens = self.x_embedder(x) + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder(y, drop_label)
        for block in self.blocks:
            tokens = block(tokens, c)
        return self._unpatchify(self.final_layer(tokens, c))

    def _unpatchify(self, patches: Tensor) -> Tensor:
        """Lay patches (B, T, p * p * C) out as images (B, C, H, W)."""
        grid, side = self.x_embedder.grid_size, self.patch_size
        cells = patches.reshape(patches.shape[0], grid, grid, side, side, self.out_channels)
        images = cells.permute(0, 5, 1, 3, 2, 4)
        return images.reshape(patches.shape[0], self.out_channels, grid * side, grid * side)


_SIZES: dict[str, dict[str, int]] = {
    "S": {"hidden_size": 384, "depth": 12, "num_heads": 6},
    "B": {"hidden_size": 768, "depth": 12, "num_heads": 12},
    "L": {"hidden_size": 1024, "depth": 24, "num_heads": 16},
    "XL": {"hidden_size": 1152, "depth": 28, "num_heads": 16},
}
_PRESETS: dict[str, dict[str, Any]] = {
    f"DiT-{size}/{patch}": {**shape, "patch_size": patch} for size, shape in _SIZES.items() for patch in (2, 4, 8)
}
_PRESETS["DiT-digits"] = {
    "input_size": 8, "in_channels": 1, "num_classes": 10, "patch_size": 8,
    "hidden_size": 64, "depth": 2, "num_heads": 4, "learn_sigma": False,
}  # fmt: skip
_PRESETS["DiT-tiny"] = {
    "input_size": 8, "in_channels": 1, "num_classes": 10, "patch_size": 2,
    "hidden_size": 48, "depth": 2, "num_heads": 4, "learn_sigma": False,
}  # fmt: skip


HEADS = {shape["hidden_size"]: shape["num_heads"] for shape in _SIZES.values()}
"""Attention heads of the published sizes, by width."""


def preset(name: str) -> dict[str, Any]:
    """The arguments of `DiT` that a name stands for; none if there is no such name."""
    return dict(_PRESETS.get(name, {}))


def dit(name: str, **overrides: Any) -> DiT:
    """Build a DiT by its published name.

    Args:
        name: "DiT-XL/2", with S, B, L or XL and patch 2, 4 or 8 (32 x 32 x 4 latents, 1000 classes unless
            overridden); or, for 8 x 8 grey digits of 10 classes, "DiT-digits" (one token) and "DiT-tiny" (16 tokens).
        **overrides: any argument of `DiT`.

    Raises:
        ConfigurationError: an unknown name.
    """
    if name not in _PRESETS:
        raise ConfigurationError(f"model {name!r} is not known", fix=f"choose one of {', '.join(_PRESETS)}")
    return DiT(**{**_PRESETS[name], **overrides})


def _modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Scale and shift tokens (B, T, D) by conditioning (B, D)."""
    return x * (1 + scale[:, None]) + shift[:, None]


@torch.no_grad()
def _initialise(model: DiT, label_std: float) -> None:
    """Start every block as the identity and the output at zero (sec. 3.2, adaLN-Zero)."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    patches = model.x_embedder.proj
    nn.init.xavier_uniform_(patches.weight.view(patches.weight.shape[0], -1))
    if patches.bias is not None:
        nn.init.zeros_(patches.bias)
    for name, parameter in model.named_parameters():
        if name.startswith("t_embedder.") and name.endswith("weight"):
            nn.init.normal_(parameter, std=0.02)
        if name.startswith("y_embedder."):
            nn.init.normal_(parameter, std=label_std)
        if "adaLN_modulation" in name or name.startswith("final_layer.linear"):
            nn.init.zeros_(parameter)
