"""timm: vision transformers and ConvNeXt."""

from __future__ import annotations

import timm.models as tm
from timm_register import DROP, INNER, TWO_STAGES, VIT, named, register

from zoo import classification, entry, images

register("ViT", tm.VisionTransformer, quick=True, **VIT, **DROP, **INNER)
register("ViT, patches dropped", tm.VisionTransformer, **VIT, patch_drop_rate=0.5)
register("DeiT3", tm.VisionTransformer, quick=True, **VIT, **DROP, no_embed_class=True, init_values=0.1)
register("DeiT distilled", tm.VisionTransformerDistilled, **VIT, **DROP)
register("ViT, map pooling, registers", tm.VisionTransformer, **VIT, reg_tokens=2, global_pool="map", qk_norm=True)
register("ViT, relative positions", tm.VisionTransformerRelPos, **VIT, **DROP)
register("ViT, parallel blocks", tm.VisionTransformer, **VIT, block_fn=tm.vision_transformer.ParallelScalingBlock)
register(
    "SAM ViT", tm.VisionTransformerSAM, **VIT, window_size=2, global_attn_indexes=(1,), neck_chans=8, use_rel_pos=True
)
register("EVA-02", tm.Eva, quick=True, **VIT, **DROP, use_rot_pos_emb=True, ref_feat_shape=(4, 4), swiglu_mlp=True)
register("EVA, patches dropped", tm.Eva, **VIT, use_rot_pos_emb=True, patch_drop_rate=0.5)
register("BEiT", tm.Beit, **VIT, **DROP, init_values=0.1, use_rel_pos_bias=True)
register("BEiT, shared relative bias", tm.Beit, **VIT, use_shared_rel_pos_bias=True, **DROP)
register("CaiT", tm.Cait, quick=True, **VIT, **DROP)
register("XCiT", tm.Xcit, **{**VIT, "patch_size": 8}, **DROP, replace=True)
register("ConViT", tm.ConVit, **VIT, **DROP, local_up_to_layer=1)
register(
    "TNT",
    tm.TNT,
    img_size=16,
    patch_size=4,
    embed_dim=16,
    depth=2,
    inner_dim=8,
    num_heads_inner=2,
    num_heads_outer=2,
    first_stride=2,
    **DROP,
)
register("NaFlexViT", named("naflexvit_base_patch16_gap"), **{k: v for k, v in VIT.items() if k != "img_size"}, **DROP)
register("Swin", tm.SwinTransformer, quick=True, patch_size=2, img_size=16, **TWO_STAGES, **DROP, **INNER)
register("Swin V2", tm.SwinTransformerV2, patch_size=2, img_size=16, **TWO_STAGES, **DROP)
register("Swin V2, log positions (Cr)", tm.SwinTransformerV2Cr, patch_size=2, img_size=16, **TWO_STAGES, **DROP)
register("ConvNeXt", tm.ConvNeXt, 32, quick=True, depths=(1, 1, 1, 1), dims=(4, 8, 8, 8), ls_init_value=0.1, **DROP)
register(
    "ConvNeXt V2", tm.ConvNeXt, 32, depths=(1, 1, 1, 1), dims=(4, 8, 8, 8), use_grn=True, ls_init_value=None, **DROP
)


@entry("timm", "ViT, activation checkpoints", "images 16x16")
def vit_checkpoints():
    model, x = tm.VisionTransformer(num_classes=5, **VIT, **DROP), images(16)
    model.set_grad_checkpointing(True)
    return model, classification(lambda: model(x))
