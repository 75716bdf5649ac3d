"""Fitting a public DiT to other images, and the modes of fine-tuning."""

from __future__ import annotations

import pytest
import torch
from denoisers import perturbed

import dither
from dither.diffusion import DiffusionLoss, Process, dit
from dither.diffusion.finetuning import FineTuning, adapt, choose_parameters, merge, trainable
from dither.errors import ConfigurationError


def public(**settings):
    model = dit("DiT-tiny", **{"learn_sigma": True, **settings})
    positions = model.pos_embed.detach().clone()
    perturbed(model)
    model.pos_embed.copy_(positions)
    return model.eval()


def inputs(count=3, side=8):
    return torch.randn(count, 1, side, side), torch.tensor([0, 400, 999]), torch.arange(count)


@torch.no_grad()
def test_the_noise_prediction_stays():
    model = public()
    x, t, y = inputs()
    fitted = adapt(model, 8, 1, 10, hides_labels=True).eval()
    torch.testing.assert_close(fitted(x, t, y), model(x, t, y)[:, :1])


@torch.no_grad()
def test_new_classes_begin_as_no_label_and_the_side_may_change():
    model = public()
    x, t, y = inputs()
    fitted = adapt(model, 8, 1, 4, hides_labels=True).eval()
    torch.testing.assert_close(fitted(x, t, y), model(x, t, torch.full_like(y, 10))[:, :1])
    assert adapt(model, 12, 1, 4, hides_labels=False)(*inputs(side=12)).shape == (3, 1, 12, 12)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ConfigurationError, match="3 channels"):
        adapt(public(), 8, 3, 10, hides_labels=True)
    with pytest.raises(ConfigurationError, match="patch_size 2"):
        adapt(public(), 9, 1, 10, hides_labels=True)
    with pytest.raises(ConfigurationError, match="learned positions"):
        adapt(dit("DiT-tiny", position="learned"), 12, 1, 10, hides_labels=True)
    with pytest.raises(ConfigurationError, match=r"mlp\.fc1"):
        choose_parameters(public(), FineTuning("lora", targets=("to_q",)))
    with pytest.raises(ConfigurationError, match="rank 0"):
        choose_parameters(public(), FineTuning("lora", rank=0))
    with pytest.raises(ConfigurationError, match="'nothing' ends no layer's name"):
        choose_parameters(public(), FineTuning("lora", targets=("qkv", "nothing")))
    with pytest.raises(ConfigurationError, match="trained itself"):
        choose_parameters(public(), FineTuning("lora", targets=("embedding_table",)))
    for alpha in (0.0, float("nan"), float("inf")):
        with pytest.raises(ConfigurationError, match="alpha"):
            choose_parameters(public(), FineTuning("lora", alpha=alpha))
    with pytest.raises(ConfigurationError, match="is a Linear"):
        choose_parameters(torch.nn.Linear(1, 1), FineTuning("biases"))


@pytest.mark.parametrize(
    ("mode", "part", "numbers"),
    [
        ("attention", ".attn.", 2 * (48 * 144 + 144 + 48 * 48 + 48)),
        ("biases", "bias", None),
        ("lora", ".lora_", 2 * 4 * (48 + 144 + 48 + 48)),
    ],
)
def test_modes(mode, part, numbers):
    """Trained is what the mode says and the labels' table, exactly; nothing else has a gradient."""
    model = public(learn_sigma=False).train()
    choose_parameters(model, FineTuning(mode, rank=4))
    names = trainable(model)
    assert names.count("y_embedder.embedding_table.weight") == 1
    assert all(part in name or name.startswith("y_embedder") for name in names)
    sizes = dict(model.named_parameters())
    if numbers is not None:
        assert sum(sizes[name].numel() for name in names) == numbers + 11 * 48
    else:
        assert len(names) == 1 + sum(name.endswith("bias") for name in sizes)
    batch = torch.randn(3, 1, 8, 8), torch.arange(3)
    loss = DiffusionLoss(Process(), generator=torch.Generator())
    draws = loss.draw(batch[0])
    report = dither.verify(model, lambda: loss.at(model, *batch, draws), ("auto",))
    assert report.exact
    assert set(report.errors) == set(names)


@torch.no_grad()
def test_merged_updates_compute_the_same():
    model = public(learn_sigma=False)
    plain = set(model.state_dict())
    x, t, y = inputs()
    before = model(x, t, y)
    choose_parameters(model, FineTuning("lora", rank=2, alpha=8.0, targets=("attn.qkv", "mlp.fc1")))
    torch.testing.assert_close(model(x, t, y), before)  # updates begin at zero
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.normal_(std=0.1)
    trained = model(x, t, y)
    assert not torch.allclose(trained, before, atol=1e-2)
    merge(model)
    assert set(model.state_dict()) == plain
    torch.testing.assert_close(model(x, t, y), trained, rtol=1e-4, atol=1e-5)
