"""Pictures of an evaluation: generated images beside the real ones nearest to them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from dither.evaluation.neighbours import Neighbours


def save_neighbours(found: Neighbours, generated: Tensor, training: Tensor, file: Path, count: int = 20) -> None:
    """Write the generated images that are nearest to training images (first row), and those (second row), as a PNG.

    It shows real images: not private.

    Args:
        found: of `nearest`.
        generated: (N, C, H, W) in [-1, 1].
        training: (M, C, H, W).
        file: the PNG.
        count: columns, nearest first.
    """
    from PIL import Image

    from dither.diffusion.export import to_pixels

    chosen = found.distances.argsort()[:count]
    rows = torch.stack([generated[chosen], training[found.indices[chosen]]])  # (2, n, C, H, W)
    sheet = to_pixels(rows).permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)  # (2 H, n W, C)
    picture = Image.fromarray((sheet[..., 0] if sheet.shape[-1] == 1 else sheet[..., :3]).contiguous().numpy())
    scale = max(1, 48 // generated.shape[-1])
    picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST).save(file)
