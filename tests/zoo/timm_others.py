"""timm: mixers, hierarchical and mobile networks."""

from __future__ import annotations

import timm.models as tm
from timm.models import metaformer, resnet
from timm.models.inception_next import MetaNeXt
from timm.models.mambaout import MambaOut
from timm_register import DROP, GROUP_ACT, INNER, STAGES, named, register

from zoo import group_norm

MIXER = {"img_size": 16, "patch_size": 4, "num_blocks": 2, "embed_dim": 16}
register("MLP-Mixer", tm.MlpMixer, quick=True, **MIXER, **DROP, proj_drop_rate=0.1)
register("ResMLP", tm.MlpMixer, **MIXER, block_layer=tm.mlp_mixer.ResBlock, norm_layer=tm.mlp_mixer.Affine, mlp_ratio=4)
register(
    "gMLP",
    tm.MlpMixer,
    **MIXER,
    block_layer=tm.mlp_mixer.SpatialGatingBlock,
    mlp_layer=tm.mlp_mixer.GatedMlp,
    mlp_ratio=4,
)
register("PVT v2", tm.PyramidVisionTransformerV2, 64, quick=True, **STAGES, sr_ratios=(8, 4, 2, 1), **DROP, **INNER)
register(
    "Twins-SVT", tm.Twins, 32, img_size=32, **STAGES, patch_size=2, sr_ratios=(4, 2, 2, 1), wss=(2, 2, 2, 2), **DROP
)
register(
    "CoaT",
    tm.CoaT,
    32,
    img_size=32,
    patch_size=4,
    embed_dims=(8, 8, 8, 8),
    serial_depths=(1, 1, 1, 1),
    num_heads=8,
    **DROP,
)
register(
    "CrossViT",
    tm.CrossVit,
    24,
    img_size=24,
    img_scale=(1.0, 1.0),
    patch_size=(4, 8),
    embed_dim=(8, 16),
    depth=((1, 1, 0),),
    num_heads=(2, 2),
    **DROP,
)
register(
    "PiT",
    tm.PoolingVisionTransformer,
    16,
    img_size=16,
    patch_size=4,
    stride=2,
    base_dims=(4, 4),
    depth=(1, 1),
    heads=(2, 4),
    **DROP,
)
register("NesT", tm.Nest, img_size=16, patch_size=2, num_levels=2, embed_dims=(8, 16), num_heads=(2, 2), depths=(1, 1))
register("ConvMixer", tm.ConvMixer, dim=8, depth=2, kernel_size=3, patch_size=4, replace=True, drop_rate=0.2)
register("FocalNet", tm.FocalNet, 32, embed_dim=4, depths=(1, 1, 1, 1), layerscale_value=0.1, **DROP)
register("DaViT", tm.DaVit, 32, **STAGES, window_size=2, **DROP)
register(
    "MViTv2",
    tm.MultiScaleVit,
    32,
    img_size=(32, 32),
    cfg=tm.mvitv2.MultiScaleVitCfg(
        depths=(1, 1), embed_dim=8, num_heads=2, stride_q=((1, 1), (2, 2)), use_cls_token=True
    ),
    **DROP,
)
register(
    "Hiera",
    tm.Hiera,
    32,
    img_size=(32, 32),
    embed_dim=8,
    stages=(1, 1),
    q_pool=1,
    mask_unit_size=(2, 2),
    mask_unit_attn=(True, False),
    **DROP,
)
register(
    "EdgeNeXt", tm.EdgeNeXt, 32, dims=(8, 8, 16, 16), depths=(2, 2, 2, 2), heads=(2, 2, 2, 2), ls_init_value=0.1, **DROP
)
register(
    "VOLO",
    tm.VOLO,
    32,
    img_size=32,
    layers=(1, 1, 1, 1),
    embed_dims=(8, 16, 16, 16),
    num_heads=(2, 2, 2, 2),
    stem_hidden_dim=8,
    replace=True,
    **DROP,
)
register(
    "PoolFormer",
    tm.MetaFormer,
    32,
    quick=True,
    depths=(1, 1, 1, 1),
    dims=(4, 8, 8, 8),
    layer_scale_init_values=0.1,
    **DROP,
)
register(
    "CAFormer",
    tm.MetaFormer,
    32,
    depths=(1, 1, 1, 1),
    dims=(32, 32, 32, 32),
    **DROP,
    token_mixers=[metaformer.SepConv, metaformer.SepConv, metaformer.Attention, metaformer.Attention],
    norm_layers=[metaformer.LayerNorm2dNoBias] * 2 + [metaformer.LayerNormNoBias] * 2,
)
register(
    "CoAtNet",
    named("coatnet_rmlp_nano_rw_224"),
    32,
    quick=True,
    img_size=32,
    embed_dim=(32, 32, 32, 32),
    depths=(1, 1, 1, 1),
    stem_width=8,
    replace=True,
    **DROP,
)
register(
    "MaxViT",
    named("maxvit_rmlp_nano_rw_256"),
    64,
    img_size=64,
    embed_dim=(32, 32),
    depths=(1, 1),
    stem_width=8,
    replace=True,
    **DROP,
)
register(
    "MaxxViT v2",
    named("maxxvitv2_nano_rw_256"),
    64,
    img_size=64,
    embed_dim=(32, 32),
    depths=(1, 1),
    stem_width=8,
    **DROP,
)
register(
    "GCViT",
    tm.GlobalContextVit,
    64,
    img_size=64,
    window_size=(4, 4),
    embed_dim=8,
    depths=(1, 1),
    num_heads=(2, 2),
    **DROP,
)
register(
    "TinyViT",
    tm.TinyVit,
    32,
    embed_dims=(8, 8, 16, 16),
    depths=(1, 1, 1, 1),
    num_heads=(1, 1, 2, 2),
    window_sizes=(2, 2, 2, 1),
    replace=True,
    drop_path_rate=0.3,
)
register(
    "Sequencer2D (LSTM)",
    tm.Sequencer2d,
    16,
    img_size=16,
    layers=(1, 1),
    patch_sizes=(4, 2),
    embed_dims=(8, 16),
    hidden_sizes=(4, 4),
    mlp_ratios=(2.0, 2.0),
    **DROP,
)
register("MambaOut", MambaOut, 32, depths=(1, 1, 1, 1), dims=(8, 8, 16, 16), **DROP)
register(
    "RDNet",
    tm.RDNet,
    32,
    growth_rates=(8, 8),
    num_blocks_list=(1, 2),
    block_type=("Block", "BlockESE"),
    is_downsample_block=(None, True),
    num_init_features=8,
    ls_init_value=0.1,
    **DROP,
)
register("InceptionNeXt", MetaNeXt, 32, depths=(1, 1, 1, 1), dims=(16, 16, 16, 16), norm_layer=group_norm, **DROP)
register("ResNetV2 (BiT)", tm.ResNetV2, 32, layers=(1, 1), channels=(128, 128), stem_chs=32, stem_type="fixed", **DROP)
register(
    "NFNet",
    tm.NormFreeNet,
    32,
    cfg=tm.nfnet.NfCfg(
        depths=(1, 1),
        channels=(16, 16),
        stem_chs=16,
        stem_type="3x3",
        group_size=8,
        num_features=32,
        extra_conv=True,
        attn_layer="se",
        attn_kwargs={"rd_ratio": 0.5},
        act_layer="silu",
    ),
    **DROP,
)
register(
    "ResNeXt",
    tm.ResNet,
    32,
    block=resnet.Bottleneck,
    layers=(1, 1, 1, 1),
    channels=(4, 4, 4, 4),
    cardinality=2,
    base_width=32,
    norm_layer=group_norm,
    **DROP,
)
register("MobileNetV2", named("mobilenetv2_035"), 32, norm_layer=GROUP_ACT, **DROP)
register("MobileNetV3", named("mobilenetv3_small_050"), 32, quick=True, replace=True, **DROP)
register(
    "EfficientNet",
    tm.EfficientNet,
    32,
    quick=True,
    stem_size=8,
    num_features=32,
    norm_layer=GROUP_ACT,
    **DROP,
    block_args=tm._efficientnet_builder.decode_arch_def([["ds_r1_k3_s1_e1_c8_se0.25"], ["ir_r2_k5_s2_e4_c16_se0.25"]]),
)
register("GhostNet", named("ghostnet_050"), 32, replace=True, drop_rate=0.2)
register("RepViT", tm.RepVit, 32, embed_dim=(8, 8), depth=(1, 1), replace=True, drop_rate=0.2)
