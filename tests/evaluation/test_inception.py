"""Inception's features, from files of random weights: as torchvision's own pipeline and pytorch-fid's compute them."""

from __future__ import annotations

import sys

import pytest
import pytorch_fid.inception
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import inception_v3

from dither.errors import CheckpointError, ConfigurationError, MissingPackageError
from dither.evaluation.inception import FID_WEIGHTS, TORCHVISION_WEIGHTS, Inception, load_inception


@pytest.fixture(scope="module", params=["torchvision", "pytorch-fid"])
def weights(request, tmp_path_factory):
    """A file in one of the layouts, with weights that keep the size of what passes."""
    torch.manual_seed(0)
    fid = request.param == "pytorch-fid"
    network = inception_v3(weights=None, num_classes=1008 if fid else 1000, aux_logits=not fid, init_weights=False)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    file = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(network.state_dict(), file)
    return file


def images(channels):
    """A picture of 8 x 8 pixels of 8 bits, in [-1, 1]."""
    return torch.randint(0, 256, (1, channels, 8, 8), generator=torch.Generator().manual_seed(1)) / 127.5 - 1


def by_torchvision(file, x):
    """The published network: images in [0, 1], normalised by ImageNet's mean and deviation, which it takes back."""
    network = inception_v3(weights=None, transform_input=True, init_weights=False).eval()
    network.load_state_dict(torch.load(file))
    seen = []
    network.avgpool.register_forward_hook(lambda module, inputs, output: seen.append(output.flatten(1)))
    mean, deviation = (torch.tensor(part).view(3, 1, 1) for part in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    resized = F.interpolate((x + 1) / 2, size=(299, 299), mode="bilinear")
    network((resized - mean) / deviation)
    return seen[0]


def by_pytorch_fid(file, x, monkeypatch):
    """pytorch-fid's own class, whose download is our file."""
    monkeypatch.setattr(pytorch_fid.inception, "load_state_dict_from_url", lambda *words, **options: torch.load(file))
    return pytorch_fid.inception.InceptionV3().eval()((x + 1) / 2)[0].flatten(1)


@pytest.mark.parametrize("channels", [1, 3])
def test_features_are_those_of_the_network_whose_weights_they_are(weights, channels, monkeypatch):
    """Grey is repeated in three channels; what is between two of 8 bits' values is rounded."""
    found, x, seen = load_inception(weights), images(channels), []
    drawn = found.features(x + 1e-4, lambda *counts: seen.append(counts))
    with torch.no_grad():
        x = x.repeat(1, 3 // channels, 1, 1)
        expected = by_pytorch_fid(weights, x, monkeypatch) if found.is_fid else by_torchvision(weights, x)
    assert drawn.shape == (1, 2048) and expected.std() > 1e-3
    torch.testing.assert_close(drawn, expected, rtol=1e-3, atol=1e-3 * float(expected.std()))
    assert ("is FID" in found.description) is found.is_fid and len(found.sha256) == 64
    assert seen == [(1, 1)] and not drawn.requires_grad and not drawn.is_inference()
    with pytest.raises(ConfigurationError, match="channels"):
        found.features(torch.zeros(1, 4, 8, 8))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_images_of_16_bits_are_rounded_to_8_bits_in_float32(dtype):
    found, drawn = Inception(nn.Flatten(), False, ""), images(3).to(dtype)
    assert torch.equal(found.features(drawn), found.features(drawn.float()))


def test_a_network_of_1008_classes_with_torchvisions_second_head_is_not_fids(tmp_path):
    network = inception_v3(weights=None, num_classes=1008, aux_logits=True, init_weights=False)
    torch.save(network.state_dict(), tmp_path / "mine.pth")
    assert not load_inception(tmp_path / "mine.pth").is_fid


def test_what_is_no_file_of_weights(tmp_path):
    with pytest.raises(ConfigurationError) as refused:
        load_inception(None)
    assert FID_WEIGHTS in str(refused.value) and TORCHVISION_WEIGHTS in str(refused.value)
    (tmp_path / "text.pth").write_text("<html>404</html>")
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "linear.pth")
    torch.save({"fc.weight": torch.zeros(1000, 2048)}, tmp_path / "head.pth")
    torch.save([1], tmp_path / "list.pth")
    torch.save(torch.zeros(3), tmp_path / "tensor.pth")
    torch.save({"fc.weight": torch.zeros(1000, 2048), 3: torch.zeros(1)}, tmp_path / "number.pth")
    (tmp_path / "stop.pth").write_bytes(b".")  # pickle's end, with nothing before it
    (tmp_path / "cut.pth").write_bytes(b"J\0")  # half an integer
    damaged = ("tensor.pth", "number.pth", "stop.pth", "cut.pth")
    for name in ("missing.pth", "text.pth", "linear.pth", "head.pth", "list.pth", *damaged):
        with pytest.raises(CheckpointError, match=name) as refused:
            load_inception(tmp_path / name)
        assert FID_WEIGHTS in str(refused.value)


@pytest.mark.parametrize("package", ["torchvision.models", "pytorch_fid"])
def test_a_missing_package_is_named(package, tmp_path, monkeypatch):
    torch.save({"fc.weight": torch.zeros(1008, 2048)}, tmp_path / "head.pth")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingPackageError, match="dither\\[inception\\]"):
        load_inception(tmp_path / "head.pth")
