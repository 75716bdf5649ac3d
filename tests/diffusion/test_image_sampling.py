"""Samplers: deterministic under a seed, denoise what was learned, guide; pictures of the result."""

from __future__ import annotations

import pytest
import torch
from denoisers import perturbed
from PIL import Image
from torch import nn

from dither.diffusion import SAMPLERS, Churn, DiffusionLoss, Process, dit, image_grid, sample, save_grid
from dither.diffusion.labelled import LabelledModel
from dither.errors import ConfigurationError, LabelError, OutputPathError


class KnowsTheImage(nn.Module):
    """Predicts the noise that turns class y's constant image into x_t: a perfect denoiser."""

    in_channels, input_size = 1, 8

    def __init__(self, process):
        super().__init__()
        self.process = process
        self.values = nn.Parameter(torch.linspace(-0.8, 0.8, 10))

    def forward(self, x, t, y, drop_label):
        x_0 = torch.where(drop_label, torch.zeros(len(y)), self.values[y]).view(-1, 1, 1, 1).expand_as(x)
        alpha_bar = self.process.alphas_cumprod[t].view(-1, 1, 1, 1)
        epsilon = (x - alpha_bar.sqrt() * x_0) / (1 - alpha_bar).sqrt()
        noise = (x - alpha_bar.sqrt() * x_0) / (1 - alpha_bar).sqrt()
        return {
            "edm": self.process.target(x_0, noise, t.expand(len(x))),
            "epsilon": epsilon,
            "sample": x_0,
            "v": alpha_bar.sqrt() * epsilon - (1 - alpha_bar).sqrt() * x_0,
        }[self.process.prediction]


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("prediction", ["epsilon", "v", "sample", "edm"])
def test_perfect_denoiser_gives_its_image(sampler, prediction):
    process = Process(prediction=prediction)
    model, labels = KnowsTheImage(process), torch.arange(10)
    images = sample(model, labels, process=process, sampler=sampler, steps=20, seed=0)
    expected = model.values.detach().view(-1, 1, 1, 1).expand(-1, 1, 8, 8)
    torch.testing.assert_close(images, expected, atol=0.12, rtol=0)


def test_guidance_extrapolates():
    process = Process(prediction="sample")
    model = KnowsTheImage(process)
    off, twice, none = (
        sample(model, [6], process=process, steps=20, seed=0, guidance=scale).mean().item() for scale in (1.0, 2.0, 0.0)
    )
    assert abs(twice - 2 * off) < 0.05 and abs(none) < 0.05


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("learn_sigma", [False, True])
def test_deterministic_under_a_seed(sampler, learn_sigma):
    model = perturbed(dit("DiT-tiny", learn_sigma=learn_sigma)).train()
    settings = {"process": Process(learn_sigma=learn_sigma), "sampler": sampler, "steps": 5, "guidance": 1.5}
    first, again = (sample(model, [3, 1, 4], seed=7, batch_size=2, **settings) for _ in range(2))
    assert torch.equal(first, again) and first.shape == (3, 1, 8, 8)
    assert first.abs().max() <= 1 and first.isfinite().all()
    assert not torch.equal(first, sample(model, [3, 1, 4], seed=8, batch_size=2, **settings))
    drawn = (sample(model, [3], generator=torch.Generator().manual_seed(7), **settings) for _ in range(2))
    assert torch.equal(*drawn)
    assert model.training and not first.requires_grad and not first.is_inference()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_batches_change_nothing(sampler):
    model, labels = perturbed(dit("DiT-tiny")).double(), torch.arange(7)
    settings = {"sampler": sampler, "steps": 6, "seed": 3, "churn": Churn(3.0) if sampler == "edm" else None}
    together, alone, threes = (sample(model, labels, batch_size=size, **settings) for size in (7, 1, 3))
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=0)
    torch.testing.assert_close(together, threes, atol=1e-6, rtol=0)
    assert (together[0] - together[1]).abs().max() > 0.1


def test_a_trained_toy_denoises():
    """Two classes of constant images; training pulls the samples of each to its side."""
    torch.manual_seed(0)
    process = Process(prediction="v")
    model = dit("DiT-tiny", num_classes=2, patch_size=4, hidden_size=32, depth=1)
    labels = torch.arange(32) % 2
    images = (labels * 1.2 - 0.6).view(-1, 1, 1, 1).expand(-1, 1, 8, 8).clone()
    loss = DiffusionLoss(process, multiplicity=2, num_classes=2)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    for _ in range(120):
        optimizer.zero_grad()
        loss(model, (images, labels)).mean().backward()
        optimizer.step()
    drawn = sample(model, [0, 1] * 8, process=process, steps=20, seed=0)
    assert drawn[0::2].mean() < -0.4 and drawn[1::2].mean() > 0.4
    assert drawn.flatten(1).std(1).mean() < 0.3  # the noise is gone


def test_each_module_keeps_its_mode():
    """A part that stays in eval mode, as a frozen encoder does, is still in it after; so it is in a user's model."""
    model = KnowsTheImage(Process())
    model.frozen = nn.BatchNorm2d(1).eval()
    sample(model, [0], process=model.process, steps=2)
    assert model.training and not model.frozen.training
    LabelledModel(model, 8, 1, 10, hides_labels=True)
    assert model.training and not model.frozen.training


def test_progress_and_empty():
    seen = []
    model = dit("DiT-tiny")
    sample(model, [0, 1, 2], steps=3, batch_size=2, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(step, 6) for step in range(1, 7)]
    assert sample(model, []).shape == (0, 1, 8, 8)


def test_wrong_settings_are_named():
    model = dit("DiT-tiny")
    wrongs = [
        {"sampler": "euler"},
        {"steps": 0},
        {"steps": 1001},
        {"seed": 1, "generator": torch.Generator()},
        {"seed": -1},
        {"sampler": "ddim", "churn": Churn(1.0)},
    ]
    for wrong in wrongs:
        with pytest.raises(ConfigurationError, match="Fix:"):
            sample(model, [0], **wrong)
    with pytest.raises(LabelError):
        sample(model, [12], steps=2)
    with pytest.raises(ConfigurationError, match="image_shape"):
        sample(nn.Linear(2, 2), [0])


def test_grid(tmp_path):
    images, labels = torch.rand(7, 1, 8, 8) * 2 - 1, torch.tensor([3, 1, 3, 3, 1, 0, 0])
    path = save_grid(images, labels, tmp_path / "grid.png")
    picture = Image.open(path)
    assert picture.mode == "RGB" and picture.size == image_grid(images, labels).size
    assert picture.height > 3 * 48 and picture.width > 3 * 48
    image_grid(torch.zeros(1, 3, 64, 64), torch.zeros(1, dtype=torch.int64))
    named = image_grid(images, labels, ["ankle boot, left and right", "bag", "-", "\u978b"])
    assert named.height == picture.height and picture.width < named.width < picture.width + 150
    with pytest.raises(OutputPathError):
        save_grid(images, labels, tmp_path / "missing" / "grid.png")
