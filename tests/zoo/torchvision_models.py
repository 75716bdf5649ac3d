"""torchvision: image classifiers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torchvision.models as tv
from torch import nn
from torchvision.models.regnet import BlockParams

from zoo import REPLACED, classification, entry, group_norm, images, without_batch_norm


def register(
    name: str,
    make: Callable[..., nn.Module],
    size: int = 32,
    *,
    quick: bool = False,
    replace: bool = False,
    **config: Any,
) -> None:
    """Register a classifier of five classes; `replace` for classes whose norm layer nobody can choose."""
    replaced = replace or config.get("norm_layer") is group_norm

    @entry("torchvision", name, f"images {size}x{size}", quick=quick, note=REPLACED if replaced else "")
    def build():
        model, x = make(num_classes=5, **config), images(size)
        if replace:
            model = without_batch_norm(model)
        return model, classification(lambda: model(x))


def _regnet(**config: Any) -> nn.Module:
    return tv.RegNet(BlockParams([1, 1], [16, 16], [8, 8], [1.0, 1.0], [2, 2], 0.25), stem_width=8, **config)


register(
    "ResNet",
    tv.ResNet,
    quick=True,
    block=tv.resnet.BasicBlock,
    layers=[1, 1, 1, 1],
    width_per_group=64,
    norm_layer=group_norm,
)
register(
    "ResNeXt",
    tv.ResNet,
    block=tv.resnet.Bottleneck,
    layers=[1, 1, 1, 1],
    groups=4,
    width_per_group=4,
    norm_layer=group_norm,
)
register(
    "DenseNet",
    tv.DenseNet,
    quick=True,
    growth_rate=4,
    block_config=(2, 2),
    num_init_features=8,
    drop_rate=0.2,
    replace=True,
)
register("RegNet", _regnet, quick=True, norm_layer=group_norm)
register(
    "VisionTransformer",
    tv.VisionTransformer,
    16,
    quick=True,
    image_size=16,
    patch_size=4,
    num_layers=2,
    num_heads=2,
    hidden_dim=16,
    mlp_dim=24,
    dropout=0.2,
    attention_dropout=0.1,
)
register(
    "Swin",
    tv.SwinTransformer,
    16,
    quick=True,
    patch_size=[2, 2],
    embed_dim=8,
    depths=[1, 2],
    num_heads=[2, 2],
    window_size=[2, 2],
    dropout=0.1,
    attention_dropout=0.1,
    stochastic_depth_prob=0.3,
)
register(
    "Swin V2",
    tv.SwinTransformer,
    16,
    patch_size=[2, 2],
    embed_dim=8,
    depths=[1, 2],
    num_heads=[2, 2],
    window_size=[2, 2],
    stochastic_depth_prob=0.3,
    block=tv.swin_transformer.SwinTransformerBlockV2,
    downsample_layer=tv.swin_transformer.PatchMergingV2,
)
register(
    "ConvNeXt",
    tv.ConvNeXt,
    stochastic_depth_prob=0.3,
    layer_scale=0.1,
    block_setting=[tv.convnext.CNBlockConfig(8, 16, 1), tv.convnext.CNBlockConfig(16, None, 1)],
)
register(
    "MaxViT",
    tv.MaxVit,
    32,
    input_size=(32, 32),
    stem_channels=8,
    partition_size=2,
    block_channels=[8, 8],
    block_layers=[1, 1],
    head_dim=4,
    stochastic_depth_prob=0.3,
    norm_layer=group_norm,
)
register("MobileNetV2", tv.MobileNetV2, inverted_residual_setting=[[1, 8, 1, 1], [4, 16, 2, 2]], norm_layer=group_norm)
register("MobileNetV3", tv.mobilenet_v3_small, width_mult=0.25, norm_layer=group_norm)
register(
    "EfficientNet",
    tv.EfficientNet,
    dropout=0.2,
    stochastic_depth_prob=0.3,
    norm_layer=group_norm,
    inverted_residual_setting=[
        tv.efficientnet.MBConvConfig(1, 3, 1, 8, 8, 1),
        tv.efficientnet.MBConvConfig(4, 3, 2, 8, 16, 2),
    ],
)
register(
    "ShuffleNet V2", tv.ShuffleNetV2, stages_repeats=[1, 1, 1], stages_out_channels=[8, 16, 16, 16, 16], replace=True
)
register("MNASNet", tv.MNASNet, alpha=0.1, replace=True)
register("SqueezeNet", tv.SqueezeNet, version="1_1", dropout=0.2)
register("GoogLeNet", tv.GoogLeNet, aux_logits=False, init_weights=False, replace=True)
