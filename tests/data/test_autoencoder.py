"""A diffusers AutoencoderKL from a folder."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

from dither.data.autoencoder import Autoencoder
from dither.errors import ConfigurationError, DataError

IMAGES = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_encode_and_decode_are_the_models(vae):
    model = AutoencoderKL.from_pretrained(str(vae)).eval()
    autoencoder = Autoencoder(vae)
    assert autoencoder.source.scaling_factor == 0.5 and autoencoder.source.shift_factor == 0.25
    with torch.no_grad():
        mean = model.encode(IMAGES).latent_dist.mean
        assert torch.equal(autoencoder.encode(IMAGES), mean)
        assert not torch.equal(autoencoder.encode(IMAGES, "sample"), mean)
        decoded = model.decode(mean).sample.clamp(-1, 1)
    assert torch.allclose(autoencoder.decode((mean - 0.25) * 0.5, batch_size=2), decoded, atol=1e-5)


def test_each_image_is_encoded_by_itself(vae):
    autoencoder = Autoencoder(vae)
    together, alone = autoencoder.encode(IMAGES), autoencoder.encode(IMAGES[1:2])
    assert torch.allclose(together[1:2], alone, atol=1e-5)


def test_sizes_that_do_not_shrink_evenly(vae):
    with pytest.raises(ConfigurationError, match="no multiple of 2"):
        Autoencoder(vae).check_size(7)


def test_what_is_no_autoencoder(tmp_path):
    with pytest.raises(DataError, match=r"no config\.json"):
        Autoencoder(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(DataError, match="no AutoencoderKL that diffusers can open"):
        Autoencoder(tmp_path)
