"""Files of latents: scaled by public constants, finite, with a label set."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from dither.data import Latents, read_images
from dither.data.latents import save_latents
from dither.errors import BrokenImagesError, ConfigurationError, DataError

LATENTS = torch.randn(5, 4, 3, 3, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 1, 0, 1])
SOURCE = Latents("somewhere/vae", 0.5, 0.25)


@pytest.mark.parametrize("kind", [torch.float32, torch.float16])
def test_what_is_saved_is_read_scaled(kind, tmp_path):
    file = tmp_path / "a.safetensors"
    save_latents(file, LATENTS.to(kind), LABELS, SOURCE, ("cat", "dog"))
    data = read_images(file)
    assert (data.name, data.image_size, data.channels, data.class_names) == ("a", 3, 4, ("cat", "dog"))
    assert data.latents == SOURCE
    latents, labels = data.batch([4, 0])
    assert latents.dtype == torch.float32
    assert torch.equal(latents, (LATENTS.to(kind)[[4, 0]].float() - 0.25) * 0.5)
    assert labels.tolist() == [1, 0]


def test_values_that_are_not_finite_are_named(tmp_path):
    latents = LATENTS.clone()
    latents[1, 0, 0, 0], latents[3, 1, 1, 1] = torch.nan, torch.inf
    file = tmp_path / "a.safetensors"
    save_latents(file, latents, LABELS, SOURCE, ("cat", "dog"))
    with pytest.raises(BrokenImagesError, match=r"2 of 5 .*\n  example 1: .*not finite\n  example 3"):
        read_images(file)
    data = read_images(file, skip_broken=True)
    assert data.labels.tolist() == [0, 1, 1] and len(data.left_out) == 2
    assert torch.equal(data.batch()[0], (LATENTS[[0, 2, 4]] - 0.25) * 0.5)


def test_size_and_channels_are_the_files(tmp_path):
    file = tmp_path / "a.safetensors"
    save_latents(file, LATENTS, LABELS, SOURCE, ("cat", "dog"))
    with pytest.raises(ConfigurationError, match="size and channels are fixed"):
        read_images(file, image_size=32)
    with pytest.raises(DataError, match="no held-out part"):
        read_images(file, split="held-out")


NAMES = {"class_names": json.dumps(["cat", "dog"])}
SCALE = {"scaling_factor": "0.5"}


@pytest.mark.parametrize(
    ("tensors", "metadata", "message"),
    [
        ({"z": LATENTS, "labels": LABELS}, SCALE | NAMES, "has labels, z, but no latents"),
        ({"latents": LATENTS}, SCALE | NAMES, "no labels"),
        ({"latents": LATENTS[..., :2], "labels": LABELS}, SCALE | NAMES, r"shape \(5, 4, 3, 2\)"),
        ({"latents": LATENTS.long(), "labels": LABELS}, SCALE | NAMES, "type torch.int64"),
        ({"latents": LATENTS[:0], "labels": LABELS[:0]}, SCALE | NAMES, "no latents"),
        ({"latents": LATENTS, "labels": LABELS[:4]}, SCALE | NAMES, r"5 images and labels of shape \(4,\)"),
        ({"latents": LATENTS, "labels": LABELS + 1}, SCALE | NAMES, r"outside 0..1: 2 \(example 1\)"),
        ({"latents": LATENTS, "labels": LABELS}, NAMES, "does not state its autoencoder's scaling_factor"),
        ({"latents": LATENTS, "labels": LABELS}, {"scaling_factor": "nan"} | NAMES, "scaling_factor nan"),
        ({"latents": LATENTS, "labels": LABELS}, SCALE, "which classes there are"),
        ({"latents": LATENTS, "labels": LABELS}, SCALE | {"class_names": "cat"}, "no JSON"),
        ({"latents": LATENTS, "labels": LABELS}, SCALE | {"class_names": "1"}, "no list"),
    ],
)
def test_wrong_files_are_refused(tensors, metadata, message, tmp_path):
    file = tmp_path / "a.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata)
    with pytest.raises(DataError, match=message):
        read_images(file)


def test_damaged_file(tmp_path):
    file = tmp_path / "a.safetensors"
    save_latents(file, LATENTS, LABELS, SOURCE, ("cat", "dog"))
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(DataError, match="cannot be read"):
        read_images(file)
