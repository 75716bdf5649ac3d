"""Small data sets on disk."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
from PIL import Image


def ramp(value: int, size: tuple[int, int] = (6, 6), channels: int = 3) -> Image.Image:
    """A picture that is brighter to the right, in every row alike."""
    width, height = size
    row = np.linspace(value, 255, width).round().astype(np.uint8)
    grey = np.broadcast_to(row, (height, width))
    return Image.fromarray(grey.copy() if channels == 1 else np.stack([grey] * 3, -1))


def class_folders(root: Path, classes: dict[str, int], **settings) -> Path:
    """PNG files in one subfolder per class."""
    for name, count in classes.items():
        (root / name).mkdir(parents=True)
        for index in range(count):
            ramp(index * 10, **settings).save(root / name / f"{index}.png")
    return root


def idx_bytes(array: np.ndarray) -> bytes:
    sizes = b"".join(length.to_bytes(4, "big") for length in array.shape)
    return bytes((0, 0, 8, array.ndim)) + sizes + array.astype(np.uint8).tobytes()


def idx_folder(root: Path, images: np.ndarray, labels: np.ndarray, *, part: str = "train", packed: bool = True) -> Path:
    root.mkdir(exist_ok=True)
    for name, array in ((f"{part}-images-idx3-ubyte", images), (f"{part}-labels-idx1-ubyte", labels)):
        content = idx_bytes(array)
        (root / (f"{name}.gz" if packed else name)).write_bytes(gzip.compress(content) if packed else content)
    return root


def save_autoencoder(folder: Path, channels: int = 3) -> Path:
    """A random AutoencoderKL that shrinks by 2, with a shift as newer ones have."""
    import torch
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoencoderKL(
            in_channels=channels,
            out_channels=channels,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 16),
            layers_per_block=1,
            norm_num_groups=4,
            latent_channels=4,
            scaling_factor=0.5,
            shift_factor=0.25,
        )
    model.save_pretrained(str(folder))
    return folder
