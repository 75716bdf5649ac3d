"""diffusers: autoencoders."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers_inputs import video

from zoo import B, denoising, entry, images, timesteps


def autoencoder(name: str, model: Any, x: Any, inputs: str = "images", **options: Any) -> None:
    """Register an autoencoder; where it can, it draws from its posterior."""
    sampled = options.pop("sampled", True)
    extra = options.pop("extra", {})

    @entry("diffusers", name, inputs + (", posterior drawn" if sampled else ""), **options)
    def build():
        made, given = model(), x()
        arguments = {"sample_posterior": True, **extra} if sampled else extra
        return made, denoising(lambda: made(given, **arguments, return_dict=False)[0])


ENCODER = {"down_block_types": ("DownEncoderBlock2D",) * 2, "block_out_channels": (8, 16), "latent_channels": 4}
DECODER = {"up_block_types": ("UpDecoderBlock2D",) * 2}
autoencoder(
    "AutoencoderKL",
    lambda: diffusers.AutoencoderKL(**ENCODER, **DECODER, norm_num_groups=4),
    lambda: images(8),
    quick=True,
)
autoencoder(
    "AutoencoderTiny",
    lambda: diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    ),
    lambda: images(8),
    sampled=False,
)


@entry("diffusers", "AutoencoderKL, temporal decoder", "videos as rows of frames, posterior drawn")
def temporal_decoder():
    model = diffusers.AutoencoderKLTemporalDecoder(
        down_block_types=("DownEncoderBlock2D",) * 2, block_out_channels=(32, 32), latent_channels=4
    )
    frames = torch.randn(2 * B, 3, 8, 8)

    def forward():
        rows = model(frames, sample_posterior=True, num_frames=2, return_dict=False)[0]
        return rows.unflatten(0, (B, 2))

    return model, denoising(forward)


autoencoder(
    "AsymmetricAutoencoderKL",
    lambda: diffusers.AsymmetricAutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        down_block_out_channels=(8, 16),
        norm_num_groups=4,
        up_block_types=("UpDecoderBlock2D",) * 2,
        up_block_out_channels=(8, 16),
    ),
    lambda: images(8),
)
autoencoder(
    "VQModel",
    lambda: diffusers.VQModel(**{**ENCODER, "latent_channels": 3}, **DECODER, norm_num_groups=4, num_vq_embeddings=8),
    lambda: images(8),
    sampled=False,
    note="without the codebook's own loss",
)
autoencoder(
    "AutoencoderDC",
    lambda: diffusers.AutoencoderDC(
        latent_channels=4,
        attention_head_dim=4,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
    ),
    lambda: images(8),
    sampled=False,
)
autoencoder(
    "AutoencoderKL of Wan",
    lambda: diffusers.AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[True], dropout=0.1
    ),
    lambda: video(3, 5),
    "video",
)
autoencoder(
    "AutoencoderKL of CogVideoX",
    lambda: diffusers.AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 2,
        up_block_types=("CogVideoXUpBlock3D",) * 2,
        block_out_channels=(8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=4,
        temporal_compression_ratio=2,
    ),
    lambda: video(3, 3),
    "video",
)
autoencoder(
    "AutoencoderOobleck",
    lambda: diffusers.AutoencoderOobleck(
        encoder_hidden_size=4,
        downsampling_ratios=[2, 4],
        channel_multiples=[1, 2],
        decoder_channels=4,
        decoder_input_channels=2,
        audio_channels=2,
    ),
    lambda: torch.randn(B, 2, 32),
    "sound waves",
)


@entry("diffusers", "Consistency decoder", "images, posterior and noise drawn")
def consistency_decoder():
    model = diffusers.ConsistencyDecoderVAE(
        encoder_block_out_channels=(8, 8),
        encoder_down_block_types=("DownEncoderBlock2D",) * 2,
        encoder_layers_per_block=1,
        encoder_norm_num_groups=4,
        decoder_block_out_channels=(8, 8),
        decoder_layers_per_block=1,
        decoder_norm_num_groups=4,
        decoder_down_block_types=("ResnetDownsampleBlock2D",) * 2,
        decoder_up_block_types=("ResnetUpsampleBlock2D",) * 2,
        sample_size=8,
    )
    model.decoder_unet.requires_grad_(True)
    x, noisy, t = images(8), torch.randn(B, 7, 8, 8), timesteps()

    def forward():
        latent = model.encode(x).latent_dist.sample()
        spread = torch.nn.functional.interpolate(latent, size=8)
        return model.decoder_unet(torch.cat([noisy[:, :3], spread], 1), t).sample

    return model, denoising(forward)
