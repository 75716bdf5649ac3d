"""Convolutions and their transposes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from case_registry import B, case, function, normal

for dims, conv, size in ((1, nn.Conv1d, (9,)), (2, nn.Conv2d, (7, 8)), (3, nn.Conv3d, (5, 4, 6))):
    for label, options in {
        "plain": {},
        "stride": {"stride": 2},
        "padding": {"padding": 1},
        "dilation": {"dilation": 2, "padding": 2},
        "groups": {"groups": 2},
        "depthwise": {"groups": 4, "bias": False},
        "same": {"padding": "same"},
        "reflect": {"padding": 1, "padding_mode": "reflect"},
        "all": {"stride": 2, "padding": 2, "dilation": 2, "groups": 2},
    }.items():
        case(
            f"conv{dims}d {label}",
            lambda c=conv, o=options: c(4, 8, 3 if "dilation" not in o else 2, **o),
            normal(B, 4, *size),
        )
case(
    "conv2d channels_last",
    lambda: nn.Conv2d(4, 6, 3),
    lambda: torch.randn(B, 4, 6, 6).to(memory_format=torch.channels_last),
)
case("conv2d, strided groups", lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), normal(B, 4, 7, 6))
case("conv2d, k rows of groups", lambda: Frames(nn.Conv2d(4, 6, 3, groups=2)), normal(B, 3, 4, 6, 6))
case("conv2d, k rows", lambda: Frames(nn.Conv2d(3, 4, 3)), normal(B, 3, 3, 6, 6))


class Frames(nn.Module):
    """(B, k, C, H, W) flattened into B * k images."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.flatten(0, 1)).unflatten(0, x.shape[:2])


# transposed
for dims, conv, size in (
    (1, nn.ConvTranspose1d, (6,)),
    (2, nn.ConvTranspose2d, (4, 5)),
    (3, nn.ConvTranspose3d, (3, 2, 4)),
):
    for label, options in {
        "plain": {},
        "stride": {"stride": 2},
        "padding": {"padding": 1},
        "output padding": {"stride": 3, "output_padding": 2},
        "output padding beyond the stride": {"dilation": 3, "output_padding": 2},
        "dilation": {"dilation": 2, "padding": 2},
        "groups": {"groups": 2},
        "depthwise": {"groups": 4, "bias": False},
        "all": {"stride": 2, "padding": 2, "dilation": 2, "groups": 2, "output_padding": 1},
    }.items():
        case(f"conv_transpose{dims}d {label}", lambda c=conv, o=options: c(4, 8, 3, **o), normal(B, 4, *size))
case(
    "conv_transpose2d, unequal options",
    lambda: nn.ConvTranspose2d(4, 6, (2, 3), stride=(2, 1), padding=(0, 1), output_padding=(1, 0)),
    normal(B, 4, 3, 5),
)
case(
    "conv_transpose2d, channels_last",
    lambda: nn.ConvTranspose2d(4, 6, 3),
    lambda: torch.randn(B, 4, 6, 6).to(memory_format=torch.channels_last),
)
case("conv_transpose2d, k rows", lambda: Frames(nn.ConvTranspose2d(3, 4, 3)), normal(B, 3, 3, 4, 4))
case("conv_transpose2d, output size", lambda: OutputSize(nn.ConvTranspose2d(3, 4, 3, stride=2)), normal(B, 3, 4, 4))
case("conv_transpose1d, channels equal B", lambda: nn.ConvTranspose1d(B, B, B), normal(B, B, B))
case("conv_transpose1d, one position", lambda: nn.ConvTranspose1d(3, 4, 2), normal(B, 3, 1))
function(
    "conv_transpose2d, weight as data",
    lambda x, w: F.conv_transpose2d(x, w, None, 2),
    normal(B, 3, 4, 4),
    w=(3, 2, 3, 3),
)
function(
    "conv2d, computed weight",
    lambda x, a, b: F.conv2d(x, torch.einsum("or,rcij->ocij", a, b)),
    normal(B, 3, 5, 5),
    a=(4, 2),
    b=(2, 3, 3, 3),
)
function("conv1d, unbatched", lambda x, w: F.conv1d(x[0], w).unsqueeze(0), normal(1, 3, 7), w=(4, 3, 3))
function(
    "conv_transpose1d, unbatched", lambda x, w: F.conv_transpose1d(x[0], w).unsqueeze(0), normal(1, 3, 7), w=(3, 4, 3)
)
case(
    "conv2d and pixel shuffle",
    lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.PixelShuffle(2), nn.PixelUnshuffle(2)),
    normal(B, 3, 4, 4),
)
case("conv, bias alone", lambda: bias_alone(nn.Conv2d(3, 4, 3)), normal(B, 3, 4, 4))
case("conv_transpose, bias alone", lambda: bias_alone(nn.ConvTranspose2d(3, 4, 3)), normal(B, 3, 4, 4))


class OutputSize(nn.Module):
    """A transposed convolution that is given the size of its output."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, output_size=(2 * x.shape[2] + 2, 2 * x.shape[3] + 1))


def bias_alone(layer: nn.Module) -> nn.Module:
    layer.weight.requires_grad_(False)
    return layer
