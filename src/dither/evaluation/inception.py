"""Features of Inception v3, on which the Frechet distance is FID (Heusel et al. 2017, arXiv:1706.08500, section 2).

The network is torchvision's. Published FIDs use weights that were ported from TensorFlow, and blocks that pool a little
differently: pytorch-fid has these. Weights are read from a file; nothing is downloaded.

Shapes: N images (N, C, H, W) in [-1, 1], C is 1 or 3.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dither.errors import CheckpointError, ConfigurationError, MissingPackageError, reason_of
from dither.files import sha256

TORCHVISION_WEIGHTS = "https://download.pytorch.org/models/inception_v3_google-0cc3c7bd.pth"
FID_WEIGHTS = (
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
)
WHERE_FROM = (
    f"give a file with --inception_weights: pytorch-fid's, which published FIDs use, from {FID_WEIGHTS}, or "
    f"torchvision's, from {TORCHVISION_WEIGHTS}"
)

_SIDE = 299
_BATCH = 32
_FID_CLASSES = 1008  # the TensorFlow network's; torchvision's has 1000


@dataclass(frozen=True)
class Inception:
    """Inception v3 up to its last pooling.

    Attributes:
        network: from images (N, 3, 299, 299) in [-1, 1] to features (N, 2048).
        is_fid: whether it is the network of published FIDs.
        sha256: of the file of weights.
    """

    network: nn.Module
    is_fid: bool
    sha256: str

    @property
    def description(self) -> str:
        """Which features these are, in words."""
        if self.is_fid:
            return "Inception v3, last pooling, with FID's own weights: the Frechet distance is FID, the kernel one KID"
        return "Inception v3, last pooling, with torchvision's weights: FID by another network than published ones"

    def features(self, images: Tensor, progress: Callable[[int, int], None] | None = None) -> Tensor:
        """What the last pooling says of images (N, C, H, W): (N, 2048) float32.

        Images are rounded to 8 bits, as files hold them, grey is repeated in three channels, and the side becomes 299
        by bilinear interpolation, as in pytorch-fid.

        Args:
            images: in [-1, 1].
            progress: called with (images done, in all).

        Raises:
            ConfigurationError: images that are neither grey nor RGB.
        """
        if images.shape[1] not in (1, 3):
            raise ConfigurationError(
                f"images with {images.shape[1]} channels are no pictures", fix="give grey or RGB images"
            )
        found = []
        with torch.inference_mode():
            for part in images.split(_BATCH):
                pixels = ((part.float().clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1
                pixels = pixels.expand(-1, 3, -1, -1)
                resized = F.interpolate(pixels, size=(_SIDE, _SIDE), mode="bilinear", align_corners=False)
                found.append(self.network(resized.contiguous(memory_format=torch.channels_last)))
                if progress is not None:
                    progress(sum(map(len, found)), len(images))
        return torch.cat(found).clone() if found else images.new_empty((0, 2048), dtype=torch.float32)


def load_inception(file: Path | None) -> Inception:
    """Build the network and load its weights.

    Args:
        file: a state dict as torchvision or pytorch-fid write theirs (.pth, .safetensors).

    Raises:
        ConfigurationError: no file is given.
        MissingPackageError: torchvision is not installed, or pytorch-fid for its file.
        CheckpointError: the file is missing, damaged, or holds another network.
    """
    if file is None:
        raise ConfigurationError("Inception's features need its weights, and there is no file of them", fix=WHERE_FROM)
    try:
        weights = dict(_read(file))
        classes = len(weights["fc.weight"])
        has_auxiliary = any(name.startswith("AuxLogits.") for name in weights)
    except Exception as error:  # a damaged file fails in as many ways as there are readers
        raise CheckpointError(f"{file} is no state dict of Inception v3: {reason_of(error)}", fix=WHERE_FROM) from error
    is_fid = classes == _FID_CLASSES and not has_auxiliary
    network = _build(classes, is_fid, has_auxiliary)
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{file} holds another network than Inception v3: {reason}", fix=WHERE_FROM) from error
    network.fc = nn.Identity()
    network = network.eval().to(memory_format=torch.channels_last)  # convolutions of a CPU are faster so
    return Inception(network, is_fid, sha256(file))


def _read(file: Path) -> Mapping[str, Tensor]:
    if file.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(str(file))
        except SafetensorError as error:
            raise ValueError(str(error)) from error
    loaded: Mapping[str, Tensor] = torch.load(file, map_location="cpu", weights_only=True)
    return loaded


def _build(classes: int, is_fid: bool, has_auxiliary: bool) -> nn.Module:
    """The network without weights. Its input is scaled to [-1, 1], so torchvision's own rescaling is off."""
    try:
        from torchvision.models import inception_v3
    except ImportError as error:
        raise _missing("torchvision") from error
    network: nn.Module = inception_v3(
        weights=None, num_classes=classes, aux_logits=has_auxiliary, transform_input=False, init_weights=False
    )
    if is_fid:
        for name, block in _fid_blocks().items():
            setattr(network, name, block)
    return network


def _fid_blocks() -> dict[str, Any]:
    """The blocks in which the network of FID differs from torchvision's, by name."""
    try:
        from pytorch_fid import inception as blocks
    except ImportError as error:
        raise _missing("pytorch-fid") from error
    return {
        "Mixed_5b": blocks.FIDInceptionA(192, pool_features=32),
        "Mixed_5c": blocks.FIDInceptionA(256, pool_features=64),
        "Mixed_5d": blocks.FIDInceptionA(288, pool_features=64),
        "Mixed_6b": blocks.FIDInceptionC(768, channels_7x7=128),
        "Mixed_6c": blocks.FIDInceptionC(768, channels_7x7=160),
        "Mixed_6d": blocks.FIDInceptionC(768, channels_7x7=160),
        "Mixed_6e": blocks.FIDInceptionC(768, channels_7x7=192),
        "Mixed_7b": blocks.FIDInceptionE_1(1280),
        "Mixed_7c": blocks.FIDInceptionE_2(2048),
    }


def _missing(package: str) -> MissingPackageError:
    return MissingPackageError(
        f"Inception's features need the package {package}, which is not installed",
        fix="pip install 'dither[inception]'",
    )
