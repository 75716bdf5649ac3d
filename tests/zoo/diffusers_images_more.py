"""diffusers: transformers that denoise images: Lumina, HunyuanDiT, AuraFlow, CogView, UViT and others."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers_inputs import HEADS, LATENT, attended, register, text, video

from zoo import B, denoising, entry, images, timesteps


def lumina_next() -> dict[str, Any]:
    rotary = diffusers.models.embeddings.get_2d_rotary_pos_embed_lumina(8, 16, 16)
    return {
        "hidden_states": images(8, 4),
        "timestep": torch.rand(B),
        "encoder_hidden_states": text(),
        "encoder_mask": attended(),
        "image_rotary_emb": rotary,
        "cross_attention_kwargs": {},
    }


register(
    "Lumina-Next",
    "latents, timestep, text, mask, rotary table",
    lambda: diffusers.LuminaNextDiT2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        hidden_size=16,
        num_layers=2,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=8,
        cross_attention_dim=12,
        learn_sigma=False,
    ),
    lumina_next,
)
register(
    "Lumina 2",
    "latents, timestep, text, mask",
    lambda: diffusers.Lumina2Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        hidden_size=24,
        num_layers=1,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=8,
        axes_dim_rope=(4, 4, 4),
        axes_lens=(32, 32, 32),
        cap_feat_dim=12,
    ),
    lambda: {
        "hidden_states": images(8, 4),
        "timestep": torch.rand(B),
        "encoder_hidden_states": text(),
        "encoder_attention_mask": torch.ones(B, 5, dtype=torch.bool),
    },
    quick=True,
)
register(
    "Lumina 2, prompts of several lengths",
    "latents, timestep, text, mask",
    lambda: diffusers.Lumina2Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        hidden_size=24,
        num_layers=1,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=8,
        axes_dim_rope=(4, 4, 4),
        axes_lens=(32, 32, 32),
        cap_feat_dim=12,
    ),
    lambda: {
        "hidden_states": images(8, 4),
        "timestep": torch.rand(B),
        "encoder_hidden_states": text(),
        "encoder_attention_mask": attended().bool(),
    },
)
register(
    "HunyuanDiT",
    "latents, timestep, two texts, masks, sizes, style",
    lambda: diffusers.HunyuanDiT2DModel(
        **HEADS,
        in_channels=4,
        patch_size=2,
        sample_size=8,
        hidden_size=16,
        num_layers=2,
        cross_attention_dim=12,
        cross_attention_dim_t5=16,
        pooled_projection_dim=8,
        text_len=5,
        text_len_t5=4,
    ),
    lambda: {
        "hidden_states": images(8, 4),
        "timestep": timesteps().double(),
        "encoder_hidden_states": text(),
        "text_embedding_mask": attended(),
        "encoder_hidden_states_t5": text(4, 16),
        "text_embedding_mask_t5": attended(4),
        "style": torch.zeros(B, dtype=torch.long),
        "image_meta_size": torch.rand(B, 6),
        "image_rotary_emb": [torch.randn(16, 8), torch.randn(16, 8)],
    },
    quick=True,
)
register(
    "AuraFlow",
    "latents, timestep, text",
    lambda: diffusers.AuraFlowTransformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        **HEADS,
        joint_attention_dim=12,
        caption_projection_dim=16,
        pos_embed_max_size=16,
    ),
    lambda: {"hidden_states": images(8, 4), "encoder_hidden_states": text(), "timestep": torch.rand(B)},
    quick=True,
)
SIZE = {
    "original_size": torch.tensor([[8.0, 8.0]] * B),
    "target_size": torch.tensor([[8.0, 8.0]] * B),
    "crop_coords": torch.zeros(B, 2),
}
COGVIEW = {
    "patch_size": 2,
    **LATENT,
    "num_layers": 2,
    **HEADS,
    "text_embed_dim": 12,
    "time_embed_dim": 16,
    "condition_dim": 4,
    "pos_embed_max_size": 8,
    "sample_size": 8,
}
register(
    "CogView3-Plus",
    "latents, timestep, text, sizes",
    lambda: diffusers.CogView3PlusTransformer2DModel(**COGVIEW),
    lambda: {"hidden_states": images(8, 4), "encoder_hidden_states": text(), "timestep": timesteps(), **SIZE},
)
register(
    "CogView4",
    "latents, timestep, text, sizes",
    lambda: diffusers.CogView4Transformer2DModel(**COGVIEW, rope_axes_dim=(8, 8)),
    lambda: {"hidden_states": images(8, 4), "encoder_hidden_states": text(), "timestep": timesteps(), **SIZE},
)
register(
    "PRX",
    "latents, timestep, text, mask",
    lambda: diffusers.PRXTransformer2DModel(
        in_channels=4,
        patch_size=2,
        context_in_dim=12,
        hidden_size=16,
        mlp_ratio=2.0,
        num_heads=2,
        depth=2,
        axes_dim=[4, 4],
    ),
    lambda: {
        "hidden_states": images(8, 4),
        "timestep": torch.rand(B),
        "encoder_hidden_states": text(),
        "attention_mask": attended().bool(),
    },
)


@entry("diffusers", "Z-Image", "lists of latents and of texts, timestep")
def z_image():
    model = diffusers.ZImageTransformer2DModel(
        in_channels=4,
        dim=24,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=12,
        axes_dims=[4, 4, 4],
        axes_lens=[64, 16, 16],
    )
    x, t, prompts = list(video(4, 1)), torch.rand(B), list(text())
    return model, denoising(lambda: torch.stack(list(model(x, t, prompts, return_dict=False)[0])))


def hi_dream(name: str, force_inference_output: bool, **options: Any) -> None:
    """Register HiDream; in training its gates compute a load-balancing term, which diffusers leaves out."""
    register(
        name,
        "latents, timestep, texts, pooled text",
        lambda: diffusers.HiDreamImageTransformer2DModel(
            patch_size=2,
            **LATENT,
            num_layers=1,
            num_single_layers=1,
            **HEADS,
            caption_channels=[12, 12],
            text_emb_dim=10,
            num_routed_experts=4,
            num_activated_experts=2,
            axes_dims_rope=(4, 2, 2),
            max_resolution=(8, 8),
            llama_layers=[0, 1],
            force_inference_output=force_inference_output,
        ),
        lambda: {
            "hidden_states": images(8, 4),
            "timesteps": timesteps(),
            "encoder_hidden_states_t5": text(),
            "encoder_hidden_states_llama3": torch.randn(2, B, 5, 12),
            "pooled_embeds": torch.randn(B, 10),
        },
        **options,
    )


hi_dream("HiDream (experts), no load balancing", True, note="its experts then run without gradient")
hi_dream("HiDream (experts), in training", False, note="diffusers computes its load-balancing term and leaves it out")


@entry("diffusers", "OmniGen", "latents, timestep, token ids, mask, positions")
def omni_gen():
    model = diffusers.OmniGenTransformer2DModel(
        in_channels=4,
        patch_size=2,
        hidden_size=16,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=24,
        num_layers=2,
        vocab_size=37,
        pad_token_id=0,
        max_position_embeddings=64,
        original_max_position_embeddings=64,
        pos_embed_max_size=8,
        time_step_dim=8,
        rope_scaling={"long_factor": [1.0] * 4, "short_factor": [1.0] * 4},
    )
    length = 4 + 1 + 16
    given = {
        "hidden_states": images(8, 4),
        "timestep": torch.rand(B),
        "input_ids": torch.randint(37, (B, 4)),
        "input_img_latents": [],
        "input_image_sizes": {},
        "position_ids": torch.arange(length).repeat(B, 1),
        "attention_mask": torch.ones(B, length, length).tril(),
    }
    return model, denoising(lambda: model(**given, return_dict=False)[0])


@entry("diffusers", "UViT (aMUSEd)", "token ids, text, pooled text, sizes", quick=True)
def uvit():
    model = diffusers.UVit2DModel(
        hidden_size=16,
        hidden_dropout=0.1,
        cond_embed_dim=8,
        micro_cond_encode_dim=4,
        micro_cond_embed_dim=20,
        encoder_hidden_size=12,
        vocab_size=20,
        codebook_size=18,
        in_channels=16,
        block_out_channels=16,
        num_res_blocks=1,
        block_num_heads=2,
        num_hidden_layers=2,
        num_attention_heads=2,
        attention_dropout=0.1,
        intermediate_size=24,
        sample_size=4,
        downsample=True,
        upsample=True,
    )
    ids, prompt, pooled, sizes = torch.randint(18, (B, 4, 4)), text(), torch.randn(B, 8), torch.rand(B, 5)
    return model, denoising(lambda: model(ids, prompt, pooled, sizes))


register(
    "Prior (unCLIP)",
    "image embedding, timestep, text embedding, text",
    lambda: diffusers.PriorTransformer(
        **HEADS, num_layers=2, embedding_dim=8, num_embeddings=5, additional_embeddings=4, dropout=0.1
    ),
    lambda: {
        "hidden_states": torch.randn(B, 8),
        "timestep": timesteps(),
        "proj_embedding": torch.randn(B, 8),
        "encoder_hidden_states": text(5, 8),
        "attention_mask": attended().bool(),
    },
)
register(
    "Transformer2D",
    "latents, text",
    lambda: diffusers.Transformer2DModel(
        **HEADS, in_channels=8, cross_attention_dim=12, norm_num_groups=4, dropout=0.1
    ),
    lambda: {"hidden_states": images(8, 8), "encoder_hidden_states": text()},
)
