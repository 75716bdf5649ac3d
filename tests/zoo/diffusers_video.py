"""diffusers: transformers that denoise video and sound."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers.models.embeddings import get_3d_rotary_pos_embed_allegro
from diffusers_inputs import HEADS, LATENT, attended, register, text, video

from zoo import B, denoising, entry, timesteps


def frames_first(**sizes: int) -> torch.Tensor:
    """(B, frames, channels, size, size)."""
    return video(**sizes).transpose(1, 2).contiguous()


def rotary_3d() -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    """Allegro's rotary tables and grid for two frames of 4x4 patches, as its pipeline makes them."""
    tables = get_3d_rotary_pos_embed_allegro(12, ((0, 0), (4, 4)), (4, 4), 2)
    places = torch.cartesian_prod(*(grid.long() for grid in tables[3:]))
    return tuple(tables[:3]), tuple(places.reshape(-1, 3).transpose(0, 1).reshape(3, 1, -1))


register(
    "CogVideoX",
    "video latents, timestep, text",
    lambda: diffusers.CogVideoXTransformer3DModel(
        **HEADS,
        **LATENT,
        time_embed_dim=8,
        text_embed_dim=12,
        num_layers=2,
        sample_width=8,
        sample_height=8,
        sample_frames=5,
        max_text_seq_length=5,
        dropout=0.1,
    ),
    lambda: {"hidden_states": frames_first(), "encoder_hidden_states": text(), "timestep": timesteps()},
    quick=True,
)
register(
    "ConsisID",
    "video latents, timestep, text",
    lambda: diffusers.ConsisIDTransformer3DModel(
        **HEADS,
        **LATENT,
        time_embed_dim=8,
        text_embed_dim=12,
        num_layers=2,
        sample_width=8,
        sample_height=8,
        sample_frames=5,
        max_text_seq_length=5,
        dropout=0.1,
    ),
    lambda: {"hidden_states": frames_first(), "encoder_hidden_states": text(), "timestep": timesteps()},
)
SINGLE = {"dtype": torch.float32, "bound": 1e-5, "note": "float32: the model itself does not run in float64"}
WAN = {**HEADS, **LATENT, "text_dim": 12, "freq_dim": 8, "ffn_dim": 24, "num_layers": 2, "rope_max_seq_len": 16}


def wan_inputs() -> dict[str, Any]:
    return {"hidden_states": video(), "timestep": timesteps(), "encoder_hidden_states": text()}


register("Wan", "video latents, timestep, text", lambda: diffusers.WanTransformer3DModel(**WAN), wan_inputs, quick=True)
register(
    "Wan, image to video",
    "video latents, timestep, text, image embedding",
    lambda: diffusers.WanTransformer3DModel(**WAN, image_dim=10, added_kv_proj_dim=16),
    lambda: {**wan_inputs(), "encoder_hidden_states": text(512), "encoder_hidden_states_image": text(3, 10)},
)
register(
    "SkyReels V2", "video latents, timestep, text", lambda: diffusers.SkyReelsV2Transformer3DModel(**WAN), wan_inputs
)
register(
    "LTX-Video",
    "video tokens, timestep, text, mask",
    lambda: diffusers.LTXVideoTransformer3DModel(
        **LATENT, **HEADS, cross_attention_dim=16, num_layers=2, caption_channels=12
    ),
    lambda: {
        "hidden_states": torch.randn(B, 8, 4),
        "timestep": timesteps(),
        "encoder_hidden_states": text(),
        "encoder_attention_mask": attended(),
        "num_frames": 2,
        "height": 2,
        "width": 2,
    },
)
register(
    "Mochi",
    "video latents, timestep, text, mask",
    lambda: diffusers.MochiTransformer3DModel(
        patch_size=2,
        **HEADS,
        num_layers=2,
        pooled_projection_dim=8,
        in_channels=4,
        text_embed_dim=16,
        time_embed_dim=4,
        max_sequence_length=5,
    ),
    lambda: {
        "hidden_states": video(),
        "timestep": timesteps(),
        "encoder_hidden_states": text(5, 16),
        "encoder_attention_mask": attended().bool(),
    },
    bound=1e-6,
    note="norms in float32",
)
register(
    "Allegro",
    "video latents, timestep, text, masks, rotary table",
    lambda: diffusers.AllegroTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        **LATENT,
        num_layers=2,
        cross_attention_dim=24,
        sample_width=8,
        sample_height=8,
        sample_frames=2,
        caption_channels=12,
        dropout=0.1,
    ),
    lambda: {
        "hidden_states": video(),
        "timestep": timesteps(),
        "encoder_hidden_states": text(),
        "attention_mask": torch.ones(B, 2, 8, 8),
        "encoder_attention_mask": attended(),
        "image_rotary_emb": rotary_3d(),
    },
)
register(
    "Kandinsky 5",
    "video latents, timestep, text, pooled text, positions",
    lambda: diffusers.Kandinsky5Transformer3DModel(
        in_visual_dim=4,
        in_text_dim=12,
        in_text_dim2=10,
        time_dim=8,
        out_visual_dim=4,
        model_dim=16,
        ff_dim=24,
        num_text_blocks=1,
        num_visual_blocks=2,
        axes_dims=(2, 2, 4),
    ),
    lambda: {
        "hidden_states": frames_first().permute(0, 1, 3, 4, 2),
        "encoder_hidden_states": text(),
        "timestep": timesteps(),
        "pooled_projections": torch.randn(B, 10),
        "visual_rope_pos": (torch.arange(2), torch.arange(4), torch.arange(4)),
        "text_rope_pos": torch.arange(5),
    },
    outputs=lambda sample: sample,
    **SINGLE,
)
register(
    "Latte",
    "video latents, timestep, text",
    lambda: diffusers.LatteTransformer3DModel(
        **HEADS,
        **LATENT,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        cross_attention_dim=16,
        caption_channels=12,
        attention_bias=True,
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        video_length=2,
        norm_elementwise_affine=False,
        dropout=0.1,
    ),
    lambda: {"hidden_states": video(), "timestep": timesteps(), "encoder_hidden_states": text()},
)
register(
    "HunyuanVideo",
    "video latents, timestep, text, mask, pooled text, guidance",
    lambda: diffusers.HunyuanVideoTransformer3DModel(
        **LATENT,
        **HEADS,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        text_embed_dim=12,
        pooled_projection_dim=8,
        rope_axes_dim=(2, 2, 4),
    ),
    lambda: {
        "hidden_states": video(),
        "timestep": timesteps(),
        "encoder_hidden_states": text(),
        "encoder_attention_mask": attended(),
        "pooled_projections": torch.randn(B, 8),
        "guidance": torch.rand(B),
    },
)
register(
    "Cosmos",
    "video latents, timestep, text, padding mask",
    lambda: diffusers.CosmosTransformer3DModel(
        **LATENT,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        text_embed_dim=12,
        adaln_lora_dim=4,
        max_size=(4, 8, 8),
    ),
    lambda: {
        "hidden_states": video(),
        "timestep": timesteps(),
        "encoder_hidden_states": text(),
        "padding_mask": torch.zeros(1, 1, 8, 8),
        "fps": 16,
    },
    **SINGLE,
)
register(
    "EasyAnimate",
    "video latents, timestep, text",
    lambda: diffusers.EasyAnimateTransformer3DModel(
        **{**HEADS, "attention_head_dim": 16},
        **LATENT,
        patch_size=2,
        num_layers=2,
        mmdit_layers=1,
        time_embed_dim=8,
        text_embed_dim=12,
        dropout=0.1,
    ),
    lambda: {"hidden_states": video(), "timestep": timesteps(), "encoder_hidden_states": text()},
)
register(
    "Sana-Video",
    "video latents, timestep, text",
    lambda: diffusers.SanaVideoTransformer3DModel(
        **LATENT,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=12,
        cross_attention_dim=24,
        caption_channels=12,
        sample_size=8,
        rope_max_seq_len=16,
        dropout=0.1,
    ),
    lambda: {"hidden_states": video(), "timestep": timesteps(), "encoder_hidden_states": text()},
)
register(
    "Stable Audio",
    "sound latents, timestep, text, global states, rotary table",
    lambda: diffusers.StableAudioDiTModel(
        sample_size=6,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        num_key_value_attention_heads=1,
        out_channels=4,
        cross_attention_dim=8,
        time_proj_dim=8,
        global_states_input_dim=10,
        cross_attention_input_dim=12,
    ),
    lambda: {
        "hidden_states": torch.randn(B, 4, 6),
        "timestep": torch.rand(B),
        "encoder_hidden_states": text(),
        "global_hidden_states": torch.randn(B, 1, 10),
        "rotary_embedding": (torch.randn(7, 4), torch.randn(7, 4)),
    },
)


@entry("diffusers", "T5 FiLM decoder", "spectrograms, encodings, noise time")
def t5_film():
    model = diffusers.T5FilmDecoder(
        input_dims=8, targets_length=6, d_model=16, num_layers=2, num_heads=2, d_kv=8, d_ff=24, dropout_rate=0.1
    )
    states, mask = torch.randn(B, 5, 16), attended()
    x, t = torch.randn(B, 6, 8), torch.rand(B)
    return model, denoising(lambda: model([(states, mask)], x, t))
