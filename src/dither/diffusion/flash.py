"""`DiTModelWithFlashAttention`: the constructor that `seed.md` uses, for `DiT`."""

from __future__ import annotations

from typing import Any

from dither.diffusion.dit import DiT, Position
from dither.errors import ConfigurationError


class DiTModelWithFlashAttention(DiT):
    """A `DiT` for image-to-noise training: pixels in, noise of the same shape out.

    Attention runs through `torch.nn.functional.scaled_dot_product_attention`, which picks the flash
    kernel where the device has one.

    Args:
        img_size: image side in pixels.
        patch_size: patch side; divides `img_size`.
        in_channels: image channels.
        hidden_size: token width; `embed_dim` is the same argument under timm's name.
        depth: number of blocks.
        num_heads: attention heads.
        num_classes: number of labels.
        mlp_ratio: inner width of a block's perceptron, in units of `hidden_size`.
        class_dropout_prob: probability of dropping a label in training.
        learn_sigma: False returns the input's shape, so that `mse_loss(model(x, t, y), noise)` works.
        position: "learned" (a trainable table) or "sincos".
        embed_dim: another name for `hidden_size`.
        **unknown: refused by name.

    Raises:
        ConfigurationError: sizes that do not divide each other, or an unknown argument.
    """

    def __init__(
        self,
        img_size: int = 256,
        patch_size: int = 16,
        in_channels: int = 3,
        hidden_size: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        num_classes: int = 1000,
        mlp_ratio: float = 4.0,
        class_dropout_prob: float = 0.1,
        learn_sigma: bool = False,
        position: Position = "learned",
        *,
        embed_dim: int | None = None,
        **unknown: Any,
    ) -> None:
        if unknown:
            raise ConfigurationError(
                f"DiTModelWithFlashAttention has no argument {', '.join(map(repr, unknown))}",
                fix="see help(DiTModelWithFlashAttention) for its arguments",
            )
        super().__init__(
            input_size=img_size,
            patch_size=patch_size,
            in_channels=in_channels,
            hidden_size=hidden_size if embed_dim is None else embed_dim,
            depth=depth,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            class_dropout_prob=class_dropout_prob,
            num_classes=num_classes,
            learn_sigma=learn_sigma,
            position=position,
        )
