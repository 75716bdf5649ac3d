"""transformers: image classifiers, segmentation, masked autoencoders."""

from __future__ import annotations

from typing import Any

import transformers as hf
from transformers_sizes import HIDDEN, VISION

from zoo import classification, denoising, entry, images

BRANCHES = {"drop_path_rate": 0.3}


def classifier(
    name: str, config: Any, size: int = 16, /, *, quick: bool = False, note: str = "", make: Any = None, **sizes: Any
) -> None:
    """Register an image classifier of five classes."""
    make = make or hf.AutoModelForImageClassification.from_config

    @entry("transformers", name, f"images {size}x{size}", quick=quick, note=note)
    def build():
        model = make(config(**sizes, num_labels=5))
        x = images(size)
        return model, classification(lambda: model(pixel_values=x).logits)


classifier("ViT", hf.ViTConfig, quick=True, **VISION, **HIDDEN)
classifier("DeiT", hf.DeiTConfig, make=hf.DeiTForImageClassification, **VISION, **HIDDEN)
classifier("BEiT", hf.BeitConfig, **VISION, **HIDDEN, **BRANCHES, use_relative_position_bias=True)
classifier("Data2Vec vision", hf.Data2VecVisionConfig, **VISION, **HIDDEN, **BRANCHES)
classifier("DINOv2", hf.Dinov2Config, **VISION, **HIDDEN, **BRANCHES)
classifier("DINOv2 with registers", hf.Dinov2WithRegistersConfig, **VISION, **HIDDEN, **BRANCHES, num_register_tokens=2)
classifier("I-JEPA", hf.IJepaConfig, **VISION, **HIDDEN)
classifier("ViT-MSN", hf.ViTMSNConfig, **VISION, **HIDDEN)
classifier(
    "Swin",
    hf.SwinConfig,
    quick=True,
    image_size=16,
    patch_size=2,
    embed_dim=8,
    depths=[1, 2],
    num_heads=[2, 2],
    window_size=2,
    **HIDDEN,
    **BRANCHES,
)
classifier(
    "Swin V2",
    hf.Swinv2Config,
    image_size=16,
    patch_size=2,
    embed_dim=8,
    depths=[1, 2],
    num_heads=[2, 2],
    window_size=2,
    **HIDDEN,
    **BRANCHES,
)
classifier(
    "SegFormer",
    hf.SegformerConfig,
    64,
    quick=True,
    depths=[1, 1, 1, 1],
    hidden_sizes=[8, 8, 16, 16],
    num_attention_heads=[1, 1, 2, 2],
    classifier_dropout_prob=0.1,
    **HIDDEN,
    **BRANCHES,
)
classifier("ConvNeXt", hf.ConvNextConfig, 32, depths=[1, 1, 1, 1], hidden_sizes=[8, 8, 8, 8], **BRANCHES)
classifier("ConvNeXt V2", hf.ConvNextV2Config, 64, depths=[1, 1, 1, 1], hidden_sizes=[8, 8, 8, 8], **BRANCHES)
classifier(
    "PoolFormer",
    hf.PoolFormerConfig,
    64,
    depths=[1, 1, 1, 1],
    hidden_sizes=[8, 8, 8, 8],
    drop_path_rate=0.3,
    layer_scale_init_value=0.1,
)
classifier(
    "PVT",
    hf.PvtConfig,
    64,
    image_size=64,
    depths=[1, 1, 1, 1],
    hidden_sizes=[8, 8, 16, 16],
    num_attention_heads=[1, 1, 2, 2],
    patch_sizes=[4, 2, 2, 2],
    **HIDDEN,
)
classifier(
    "FocalNet",
    hf.FocalNetConfig,
    32,
    image_size=32,
    embed_dim=8,
    depths=[1, 1],
    hidden_sizes=[8, 16],
    focal_levels=[2, 2],
    focal_windows=[3, 3],
    **BRANCHES,
)
classifier(
    "BiT (weight standardisation)",
    hf.BitConfig,
    32,
    embedding_size=8,
    hidden_sizes=[16, 16],
    depths=[1, 1],
    num_groups=2,
    drop_path_rate=0.3,
)
classifier(
    "Hiera",
    hf.HieraConfig,
    32,
    image_size=[32, 32],
    embed_dim=8,
    depths=[1, 1],
    num_heads=[1, 2],
    num_query_pool=1,
    masked_unit_size=[2, 2],
    masked_unit_attention=[True, False],
    **BRANCHES,
)


@entry("transformers", "SegFormer, segmentation", "images 64x64", note="batch norm of the head in eval mode")
def segformer_segmentation():
    config = hf.SegformerConfig(
        depths=[1, 1, 1, 1],
        hidden_sizes=[8, 8, 16, 16],
        num_attention_heads=[1, 1, 2, 2],
        decoder_hidden_size=16,
        num_labels=5,
        **HIDDEN,
        **BRANCHES,
    )
    model, x = hf.SegformerForSemanticSegmentation(config), images(64)

    def forward():
        model.decode_head.batch_norm.eval()
        return model(pixel_values=x).logits

    return model, denoising(forward)


@entry("transformers", "ViT-MAE", "images 16x16, random masks")
def vit_mae():
    config = hf.ViTMAEConfig(
        **VISION,
        **HIDDEN,
        decoder_hidden_size=16,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=24,
    )
    model, x = hf.ViTMAEForPreTraining(config), images(16)
    return model, denoising(lambda: model(pixel_values=x).logits)
