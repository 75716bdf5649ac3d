"""diffusers: transformers that denoise images: DiT, PixArt, Stable Diffusion 3, the Flux family, Sana."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers_inputs import HEADS, LATENT, attended, every, register, text

from zoo import B, denoising, entry, images, timesteps

register(
    "DiT",
    "latents, timestep, class label (label drop 0.1)",
    lambda: diffusers.DiTTransformer2DModel(
        **HEADS, **LATENT, num_layers=2, sample_size=8, num_embeds_ada_norm=10, norm_num_groups=4, dropout=0.1
    ),
    lambda: {"hidden_states": images(8, 4), "timestep": timesteps(), "class_labels": torch.randint(10, (B,))},
    quick=True,
)


@entry("diffusers", "DiT, activation checkpoints", "latents, timestep, class label")
def dit_checkpoints():
    model = diffusers.DiTTransformer2DModel(
        **HEADS, **LATENT, num_layers=2, sample_size=8, num_embeds_ada_norm=10, norm_num_groups=4, dropout=0.1
    )
    model.enable_gradient_checkpointing()
    x, t, y = images(8, 4), timesteps(), torch.randint(10, (B,))
    return model, denoising(lambda: model(x, timestep=t, class_labels=y, return_dict=False)[0])


register(
    "PixArt-alpha",
    "latents, timestep, text, mask",
    lambda: diffusers.PixArtTransformer2DModel(
        **HEADS,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=16,
        sample_size=8,
        caption_channels=12,
        dropout=0.1,
        use_additional_conditions=False,
        norm_num_groups=4,
    ),
    lambda: {
        "hidden_states": images(8, 4),
        "timestep": timesteps(),
        "encoder_hidden_states": text(),
        "encoder_attention_mask": attended(),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    },
    quick=True,
)
register(
    "PixArt-alpha, sizes as conditions",
    "latents, timestep, text, resolution, aspect ratio",
    lambda: diffusers.PixArtTransformer2DModel(
        **{**HEADS, "attention_head_dim": 12},
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=24,
        sample_size=8,
        caption_channels=12,
        use_additional_conditions=True,
        norm_num_groups=4,
    ),
    lambda: {
        "hidden_states": images(8, 4),
        "timestep": timesteps(),
        "encoder_hidden_states": text(),
        "added_cond_kwargs": {"resolution": torch.rand(B, 2), "aspect_ratio": torch.rand(B, 1)},
    },
)
SD3 = {
    "sample_size": 8,
    "patch_size": 2,
    "num_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 12,
    "caption_projection_dim": 16,
    "pooled_projection_dim": 10,
    "pos_embed_max_size": 8,
}


def sd3_inputs() -> dict[str, Any]:
    return {
        "hidden_states": images(8, 4),
        "encoder_hidden_states": text(),
        "pooled_projections": torch.randn(B, 10),
        "timestep": timesteps(),
    }


register(
    "Stable Diffusion 3",
    "latents, timestep, text, pooled text",
    lambda: diffusers.SD3Transformer2DModel(**SD3, **LATENT),
    sd3_inputs,
    quick=True,
)
register(
    "Stable Diffusion 3.5",
    "latents, timestep, text, pooled text",
    lambda: diffusers.SD3Transformer2DModel(**SD3, **LATENT, dual_attention_layers=(0,), qk_norm="rms_norm"),
    sd3_inputs,
)
register(
    "SD3 ControlNet",
    "latents, control image, timestep, text, pooled text",
    lambda: diffusers.SD3ControlNetModel(**SD3, **LATENT),
    lambda: {**sd3_inputs(), "controlnet_cond": images(8, 4)},
    outputs=every,
)
FLUX = {"patch_size": 1, "in_channels": 4, "num_layers": 1, "num_single_layers": 1, **HEADS, "joint_attention_dim": 12}


def flux_inputs(axes: int = 3) -> dict[str, Any]:
    places = torch.zeros(16, axes)
    places[:, 1], places[:, 2] = torch.arange(16) // 4, torch.arange(16) % 4
    return {
        "hidden_states": torch.randn(B, 16, 4),
        "encoder_hidden_states": text(),
        "timestep": torch.rand(B),
        "img_ids": places,
        "txt_ids": torch.zeros(5, axes),
    }


register(
    "Flux",
    "latents, timestep, text, pooled text, positions, guidance",
    lambda: diffusers.FluxTransformer2DModel(
        **FLUX, pooled_projection_dim=10, guidance_embeds=True, axes_dims_rope=(2, 2, 4)
    ),
    lambda: {**flux_inputs(), "pooled_projections": torch.randn(B, 10), "guidance": torch.rand(B)},
    quick=True,
)
register(
    "Flux ControlNet",
    "latents, control latents, timestep, text, pooled text, positions",
    lambda: diffusers.FluxControlNetModel(**FLUX, pooled_projection_dim=10, axes_dims_rope=[2, 2, 4]),
    lambda: {**flux_inputs(), "pooled_projections": torch.randn(B, 10), "controlnet_cond": torch.randn(B, 16, 4)},
    outputs=every,
)
register(
    "Flux 2",
    "latents, timestep, text, positions, guidance",
    lambda: diffusers.Flux2Transformer2DModel(**FLUX, axes_dims_rope=(2, 2, 2, 2)),
    lambda: {**flux_inputs(4), "guidance": torch.rand(B)},
)
register(
    "Chroma",
    "latents, timestep, text, positions",
    lambda: diffusers.ChromaTransformer2DModel(
        **FLUX, axes_dims_rope=(2, 2, 4), approximator_num_channels=8, approximator_hidden_dim=16, approximator_layers=1
    ),
    flux_inputs,
)
register(
    "Bria",
    "latents, timestep, text, positions",
    lambda: diffusers.BriaTransformer2DModel(**FLUX, axes_dims_rope=[2, 2, 4]),
    flux_inputs,
)
register(
    "Qwen-Image",
    "latents, timestep, text, mask, sizes",
    lambda: diffusers.QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=1,
        num_layers=2,
        **HEADS,
        joint_attention_dim=12,
        axes_dims_rope=(2, 2, 4),
    ),
    lambda: {
        "hidden_states": torch.randn(B, 16, 4),
        "encoder_hidden_states": text(),
        "timestep": torch.rand(B),
        "encoder_hidden_states_mask": attended(),
        "img_shapes": [[(1, 4, 4)]] * B,
    },
)
register(
    "Sana",
    "latents, timestep, text",
    lambda: diffusers.SanaTransformer2DModel(
        **LATENT,
        num_layers=2,
        **HEADS,
        num_cross_attention_heads=2,
        dropout=0.1,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=12,
        sample_size=8,
    ),
    lambda: {"hidden_states": images(8, 4), "encoder_hidden_states": text(), "timestep": timesteps()},
    quick=True,
)
