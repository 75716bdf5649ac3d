"""diffusers: U-Nets and ControlNets."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers_inputs import attended, register, text, video

from zoo import B, denoising, entry, images, timesteps

CHANNELS = {"block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1}
CROSS = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "cross_attention_dim": 12,
    "attention_head_dim": 4,
}
CROSS_UP = {"up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")}


def unet_inputs() -> dict[str, Any]:
    return {"sample": images(8, 4), "timestep": timesteps(), "encoder_hidden_states": text()}


register(
    "UNet2D",
    "images (channels last), timestep",
    lambda: diffusers.UNet2DModel(
        sample_size=8,
        **CHANNELS,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
        dropout=0.1,
    ),
    lambda: {"sample": images(8).to(memory_format=torch.channels_last), "timestep": timesteps()},
    quick=True,
)
register(
    "UNet2D, class labels, scale-shift",
    "images, timestep, class label",
    lambda: diffusers.UNet2DModel(
        sample_size=8,
        **CHANNELS,
        down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        attention_head_dim=8,
        num_class_embeds=10,
        resnet_time_scale_shift="scale_shift",
        dropout=0.1,
    ),
    lambda: {"sample": images(8), "timestep": timesteps(), "class_labels": torch.randint(10, (B,))},
)
register(
    "UNet2DCondition (Stable Diffusion)",
    "latents, timestep, text, mask",
    lambda: diffusers.UNet2DConditionModel(sample_size=8, **CHANNELS, **CROSS, **CROSS_UP, dropout=0.1),
    lambda: {**unet_inputs(), "encoder_attention_mask": attended()},
    quick=True,
)
register(
    "UNet2DCondition (SDXL)",
    "latents, timestep, text, pooled text, sizes",
    lambda: diffusers.UNet2DConditionModel(
        sample_size=8,
        **CHANNELS,
        **CROSS,
        **CROSS_UP,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        transformer_layers_per_block=(1, 2),
        projection_class_embeddings_input_dim=34,
    ),
    lambda: {**unet_inputs(), "added_cond_kwargs": {"text_embeds": torch.randn(B, 10), "time_ids": torch.rand(B, 6)}},
)
register(
    "UNet2DCondition (Kandinsky 2.2)",
    "latents, timestep, image embedding",
    lambda: diffusers.UNet2DConditionModel(
        sample_size=8,
        **CHANNELS,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        cross_attention_dim=12,
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        attention_head_dim=4,
        addition_embed_type="image",
        encoder_hid_dim=10,
        encoder_hid_dim_type="image_proj",
        resnet_time_scale_shift="scale_shift",
    ),
    lambda: {
        "sample": images(8, 4),
        "timestep": timesteps(),
        "encoder_hidden_states": None,
        "added_cond_kwargs": {"image_embeds": torch.randn(B, 10)},
    },
)
register(
    "UNet1D",
    "series, timestep",
    lambda: diffusers.UNet1DModel(
        sample_size=32, in_channels=4, out_channels=4, block_out_channels=(32, 32, 64), extra_in_channels=64
    ),
    lambda: {"sample": torch.randn(B, 4, 32), "timestep": timesteps()},
)
register(
    "UNet1D (Janner's planner)",
    "states, timestep",
    lambda: diffusers.UNet1DModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        time_embedding_type="positional",
        use_timestep_embedding=True,
        block_out_channels=(8, 16),
        flip_sin_to_cos=False,
        freq_shift=1,
        out_block_type="OutConv1DBlock",
        down_block_types=("DownResnetBlock1D", "DownResnetBlock1D"),
        act_fn="mish",
        up_block_types=("UpResnetBlock1D",),
        mid_block_type="MidResTemporalBlock1D",
    ),
    lambda: {"sample": torch.randn(B, 4, 16), "timestep": timesteps()},
)
register(
    "UNet3DCondition",
    "video latents, timestep, text",
    lambda: diffusers.UNet3DConditionModel(
        sample_size=8,
        **CHANNELS,
        cross_attention_dim=12,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
    ),
    lambda: {"sample": video(), "timestep": timesteps(), "encoder_hidden_states": text()},
    quick=True,
)
register(
    "UNetMotion (AnimateDiff)",
    "video latents, timestep, text",
    lambda: diffusers.UNetMotionModel(
        sample_size=8,
        **CHANNELS,
        cross_attention_dim=12,
        num_attention_heads=2,
        motion_num_attention_heads=2,
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"),
    ),
    lambda: {"sample": video(), "timestep": timesteps(), "encoder_hidden_states": text().repeat_interleave(2, 0)},
)
register(
    "UNetSpatioTemporal (Stable Video)",
    "video latents, timestep, image embedding, time ids",
    lambda: diffusers.UNetSpatioTemporalConditionModel(
        sample_size=8,
        in_channels=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        cross_attention_dim=12,
        num_attention_heads=2,
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=12,
        num_frames=2,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
    ),
    lambda: {
        "sample": video(8).transpose(1, 2),
        "timestep": timesteps(),
        "encoder_hidden_states": text(1),
        "added_time_ids": torch.rand(B, 3),
    },
)
register(
    "I2VGen-XL",
    "video latents, timestep, fps, image latents, text",
    lambda: diffusers.I2VGenXLUNet(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=12,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
    ),
    lambda: {
        "sample": video(),
        "timestep": timesteps(),
        "fps": torch.full((B,), 8),
        "image_latents": video(),
        "image_embeddings": torch.randn(B, 12),
        "encoder_hidden_states": text(),
    },
)
register(
    "Kandinsky 3",
    "latents, timestep, text, mask",
    lambda: diffusers.Kandinsky3UNet(
        in_channels=4,
        time_embedding_dim=4,
        groups=2,
        attention_head_dim=4,
        layers_per_block=3,
        block_out_channels=(32, 64),
        cross_attention_dim=4,
        encoder_hid_dim=12,
    ),
    lambda: {**unet_inputs(), "encoder_attention_mask": attended()},
)


@entry("diffusers", "Stable Cascade", "latents, noise ratio, pooled text, text, image embedding")
def stable_cascade():
    model = diffusers.StableCascadeUNet(
        in_channels=4,
        out_channels=4,
        timestep_ratio_embedding_dim=8,
        conditioning_dim=16,
        block_out_channels=(16, 16),
        num_attention_heads=(2, 2),
        down_num_layers_per_block=(1, 1),
        up_num_layers_per_block=(1, 1),
        clip_text_in_channels=12,
        clip_text_pooled_in_channels=10,
        clip_image_in_channels=6,
        clip_seq=2,
    )
    x, ratio, pooled = images(8, 4), torch.rand(B), torch.randn(B, 1, 10)
    prompt, image = text(), torch.randn(B, 1, 6)
    return model, denoising(lambda: model(x, ratio, pooled, clip_text=prompt, clip_img=image, return_dict=False)[0])


@entry("diffusers", "ControlNet", "latents, timestep, text, control image", quick=True)
def control_net():
    model = diffusers.ControlNetModel(**CHANNELS, **CROSS, conditioning_embedding_out_channels=(4, 8))
    given = {**unet_inputs(), "controlnet_cond": images(16)}

    def forward():
        downs, mid = model(**given, return_dict=False)
        return [*downs, mid]

    return model, denoising(forward)


@entry("diffusers", "ControlNet and UNet2DCondition", "latents, timestep, text, control image")
def control_net_and_unet():
    unet = diffusers.UNet2DConditionModel(sample_size=8, **CHANNELS, **CROSS, **CROSS_UP)
    control = diffusers.ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 8))
    given, image = unet_inputs(), images(16)

    def forward():
        downs, mid = control(**given, controlnet_cond=image, return_dict=False)
        return unet(**given, down_block_additional_residuals=downs, mid_block_additional_residual=mid).sample

    return torch.nn.ModuleList([unet, control]), denoising(forward)


@entry("diffusers", "T2I-Adapter", "control images")
def t2i_adapter():
    model, x = diffusers.T2IAdapter(channels=[8, 8, 16, 16], num_res_blocks=1, downscale_factor=8), images(64)
    return model, denoising(lambda: model(x))
