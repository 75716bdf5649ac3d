"""diffusers' U-Nets as class-conditional denoisers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from dither.diffusion.labelled import with_hidden
from dither.errors import ConfigurationError


@dataclass(frozen=True)
class UNet:
    """A U-Net of diffusers, for --model diffusers_unet.

    Args:
        kind: UNet2DModel adds the class to the timestep's embedding; UNet2DConditionModel also shows it to
            cross-attention, as a text of one token.
        block_out_channels: channels of each level; each level after the first halves the side.
        layers_per_block: residual layers in each.
        norm_num_groups: groups of the group norms; divides every number of channels.
        attention_head_dim: channels of an attention head.
        attention: attend in the levels after the first.
        patch_size: side of the patches whose pixels become channels, before the first level and back after the last.
            2 takes a fourth of the arithmetic.
    """

    kind: Literal["UNet2DModel", "UNet2DConditionModel"] = "UNet2DModel"
    block_out_channels: tuple[int, ...] = (32, 64)
    layers_per_block: int = 1
    norm_num_groups: int = 8
    attention_head_dim: int = 8
    attention: bool = True
    patch_size: int = 1


class DiffusersUNet(nn.Module):
    """`UNet2DModel` or `UNet2DConditionModel` under the signature of `DiT`. Its output starts at zero, as a DiT's does.

    Args:
        unet: its sizes.
        input_size: image side; a multiple of the patch's, halved at each level after the first.
        in_channels: image channels C.
        num_classes: labels run from 0 to `num_classes - 1`; the row after them means "no label".
        hides_labels: whether "no label" occurs in training; where it does not, sampling with it is refused.

    Raises:
        ConfigurationError: sizes that do not go together.
    """

    def __init__(
        self, unet: UNet, input_size: int, in_channels: int, num_classes: int, hides_labels: bool = True
    ) -> None:
        super().__init__()
        self.hides_labels = hides_labels
        self.input_size, self.in_channels, self.num_classes = input_size, in_channels, num_classes
        self.patch_size, halvings = unet.patch_size, len(unet.block_out_channels) - 1
        if halvings < 0 or self.patch_size < 1 or input_size % (self.patch_size * 2**halvings):
            raise ConfigurationError(
                f"patches of side {self.patch_size} and {halvings + 1} levels do not divide the side {input_size}",
                fix="give fewer --unet.block_out_channels, another --unet.patch_size or image size",
            )
        try:
            self.unet = _build(unet, input_size // self.patch_size, in_channels * self.patch_size**2, num_classes)
        except (ValueError, ZeroDivisionError) as error:
            raise ConfigurationError(
                f"diffusers builds no such {unet.kind}: {error}", fix="see the --unet options"
            ) from error
        nn.init.zeros_(self.unet.conv_out.weight)
        nn.init.zeros_(self.unet.conv_out.bias)
        self.class_tokens = None
        if unet.kind == "UNet2DConditionModel":
            self.class_tokens = nn.Embedding(num_classes + 1, self.unet.config.cross_attention_dim)

    def forward(self, x: Tensor, t: Tensor, y: Tensor, drop_label: Tensor | None = None) -> Tensor:
        """Predict (B, C, H, W) from noisy images, timesteps (B,) and labels (B,), hidden where `drop_label` (B,)."""
        if drop_label is not None:
            y = with_hidden(y, drop_label, self.num_classes, refuse=not self.hides_labels and not self.training)
        shown = {} if self.class_tokens is None else {"encoder_hidden_states": self.class_tokens(y)[:, None]}
        folded = F.pixel_unshuffle(x, self.patch_size)
        out: Tensor = self.unet(folded, t, class_labels=y, return_dict=False, **shown)[0]
        return F.pixel_shuffle(out, self.patch_size)


def _build(unet: UNet, input_size: int, in_channels: int, num_classes: int) -> Any:
    sizes = {
        "sample_size": input_size,
        "in_channels": in_channels,
        "out_channels": in_channels,
        "block_out_channels": tuple(unet.block_out_channels),
        "layers_per_block": unet.layers_per_block,
        "norm_num_groups": unet.norm_num_groups,
        "attention_head_dim": unet.attention_head_dim,
        "num_class_embeds": num_classes + 1,
    }
    deep = len(unet.block_out_channels) - 1 if unet.attention else 0
    flat = len(unet.block_out_channels) - deep
    if unet.kind == "UNet2DModel":
        from diffusers.models.unets.unet_2d import UNet2DModel

        down, up = (
            ("DownBlock2D",) * flat + ("AttnDownBlock2D",) * deep,
            ("AttnUpBlock2D",) * deep + ("UpBlock2D",) * flat,
        )
        return UNet2DModel(down_block_types=down, up_block_types=up, add_attention=unet.attention, **sizes)
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    return UNet2DConditionModel(
        down_block_types=("DownBlock2D",) * flat + ("CrossAttnDownBlock2D",) * deep,
        up_block_types=("CrossAttnUpBlock2D",) * deep + ("UpBlock2D",) * flat,
        cross_attention_dim=unet.block_out_channels[-1],
        **sizes,
    )
