"""The tables that enter a DiT: image patches, timesteps, labels and positions.

Shapes: B examples, C channels, H = W image side, p patch side, T = (H / p)^2 tokens, D hidden width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from dither.errors import ConfigurationError, LabelError


class PatchEmbedder(nn.Module):
    """Cut an image into p x p patches and project each to the hidden width.

    Args:
        input_size: image side in pixels; a multiple of `patch_size`.
        patch_size: patch side in pixels.
        in_channels: image channels.
        hidden_size: token width D.

    Raises:
        ConfigurationError: `patch_size` does not divide `input_size`.
    """

    def __init__(self, input_size: int, patch_size: int, in_channels: int, hidden_size: int) -> None:
        super().__init__()
        if patch_size < 1 or input_size % patch_size:
            raise ConfigurationError(
                f"patch_size {patch_size} does not divide input_size {input_size}",
                fix="choose a patch size that divides the image side",
            )
        self.grid_size = input_size // patch_size
        self.num_patches = self.grid_size**2
        self.proj = nn.Conv2d(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, C, H, W) to tokens (B, T, D), row by row."""
        tokens: Tensor = self.proj(x).flatten(2).transpose(1, 2)
        return tokens


class TimestepEmbedder(nn.Module):
    """Embed a diffusion timestep: sinusoids of geometric frequencies, then a two-layer perceptron.

    Source: Peebles & Xie 2023, sec. 3.2 and appendix A (256 frequencies, SiLU).

    Args:
        hidden_size: width D of the embedding.
        frequency_size: width of the sinusoids.
        frequency_shift: as `timestep_sinusoids`.
    """

    def __init__(self, hidden_size: int, frequency_size: int = 256, frequency_shift: int = 0) -> None:
        super().__init__()
        self.frequency_size, self.frequency_shift = frequency_size, frequency_shift
        self.mlp = nn.Sequential(nn.Linear(frequency_size, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, t: Tensor) -> Tensor:
        """Map timesteps (B,) to embeddings (B, D)."""
        dtype = next(self.mlp.parameters()).dtype
        embedding: Tensor = self.mlp(timestep_sinusoids(t, self.frequency_size, shift=self.frequency_shift).to(dtype))
        return embedding


class LabelEmbedder(nn.Module):
    """A row per class, and one more for "no label" when labels are dropped for guidance.

    Args:
        num_classes: number of classes; labels run from 0 to `num_classes - 1`.
        hidden_size: row width D.
        dropout_prob: probability with which training drops a label; 0 leaves out the extra row.
    """

    def __init__(self, num_classes: int, hidden_size: int, dropout_prob: float) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.dropout_prob = dropout_prob
        self.embedding_table = nn.Embedding(num_classes + (dropout_prob > 0), hidden_size)

    def forward(self, y: Tensor, drop_label: Tensor | None = None) -> Tensor:
        """Map labels (B,) to rows (B, D).

        Args:
            y: class ids, int64; `num_classes` itself means "no label" if that row exists.
            drop_label: (B,) boolean, True where the label is replaced by "no label". None draws it
                here, once, when training, and drops nothing otherwise.

        Raises:
            LabelError: an id outside the table.
            ConfigurationError: a label is to be dropped but the table has no row for that.
        """
        if drop_label is None and self.training and self.dropout_prob > 0:
            drop_label = torch.rand(y.shape[0], device=y.device) < self.dropout_prob
        if drop_label is not None:
            if self.embedding_table.num_embeddings == self.num_classes and _readable(drop_label):
                self._refuse_dropping(drop_label)
            y = torch.where(drop_label.to(device=y.device, dtype=torch.bool), self.num_classes, y)
        if _readable(y):
            self._check_range(y)
        rows: Tensor = self.embedding_table(y)
        return rows

    def _check_range(self, y: Tensor) -> None:
        low, high = (int(bound) for bound in torch.aminmax(y)) if y.numel() else (0, 0)
        if low < 0 or high >= self.embedding_table.num_embeddings:
            raise LabelError(
                f"label {low if low < 0 else high} is outside 0..{self.num_classes - 1}",
                fix=f"map the labels to 0..{self.num_classes - 1}, or build the model with more num_classes",
            )

    def _refuse_dropping(self, drop_label: Tensor) -> None:
        if bool(drop_label.any()):
            raise ConfigurationError(
                "a label is to be dropped, but the model has no row for 'no label' (class_dropout_prob=0)",
                fix="build the model with class_dropout_prob > 0, or use label_dropout=0 and guidance=1",
            )


def timestep_sinusoids(t: Tensor, size: int, max_period: float = 10000.0, shift: int = 0) -> Tensor:
    """Return cos and sin of t (B,) at size // 2 geometric frequencies: (B, size) float32.

    Frequency i of n is max_period ** (-i / (n - shift)): shift 0 in the published DiT, 1 in diffusers'.
    """
    half = size // 2
    # Multiplied first, as both do: at t = 999 the last bit of a frequency is 1e-4 of an angle.
    exponents = -math.log(max_period) * torch.arange(half, dtype=torch.float32, device=t.device) / (half - shift)
    frequencies = torch.exp(exponents)
    angles = t.float()[:, None] * frequencies[None]
    embedding = torch.cat([angles.cos(), angles.sin()], dim=1)
    return nn.functional.pad(embedding, (0, size - 2 * half))


def position_sinusoids(hidden_size: int, grid_size: int) -> Tensor:
    """Return the fixed table (1, T, D) of a square grid: half the width for columns, half for rows.

    Raises:
        ConfigurationError: `hidden_size` is not a multiple of 4 (cos and sin for two axes).
    """
    if hidden_size % 4:
        raise ConfigurationError(
            f"hidden_size {hidden_size} is not a multiple of 4, which the sincos position table needs",
            fix="choose a multiple of 4, or position='learned'",
        )
    omega = 10000.0 ** (-torch.arange(hidden_size // 4, dtype=torch.float64) / (hidden_size / 4))
    rows, columns = torch.meshgrid(torch.arange(grid_size), torch.arange(grid_size), indexing="ij")
    axes = [axis.reshape(-1, 1).double() * omega for axis in (columns, rows)]
    table = torch.cat([wave for axis in axes for wave in (axis.sin(), axis.cos())], dim=1)
    return table.float()[None]


def _readable(y: Tensor) -> bool:
    """Whether the values may be looked at: not while compiling, on meta, or under torch.func (vmap inside grad too)."""
    return not (torch.compiler.is_compiling() or y.is_meta or torch._C._functorch.is_functorch_wrapped_tensor(y))
