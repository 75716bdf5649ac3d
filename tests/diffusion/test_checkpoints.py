"""Published and diffusers' layouts: the same weights, the same outputs, both ways."""

from __future__ import annotations

import argparse
import json
from copy import deepcopy

import pytest
import torch
from denoisers import perturbed
from diffusers import DiTTransformer2DModel

from dither.diffusion import dit
from dither.diffusion.checkpoints import architecture, load_dit, save_dit
from dither.diffusion.diffusers_dit import from_diffusers, to_diffusers
from dither.errors import CheckpointError, ConfigurationError


def model_of(**settings):
    model = dit("DiT-tiny", **settings)
    positions = model.pos_embed.detach().clone()
    perturbed(model)
    if not model.pos_embed.requires_grad:
        model.pos_embed.copy_(positions)
    return model.eval()


def inputs(model, count=4):
    x = torch.randn(count, model.in_channels, model.input_size, model.input_size)
    return x, torch.tensor([0, 17, 500, 999])[:count], torch.tensor([3, 0, 9, 10])[:count]


@torch.no_grad()
def assert_same(first, second, given):
    assert torch.equal(second(*given), first(*given))


@torch.no_grad()
@pytest.mark.parametrize("learn_sigma", [False, True])
def test_diffusers_computes_the_same_and_comes_back(learn_sigma, tmp_path):
    model = model_of(learn_sigma=learn_sigma, frequency_shift=1, in_channels=2)
    x, t, y = inputs(model)
    theirs = to_diffusers(model)
    null = torch.where(y == 10, 1000, y)  # as DiTPipeline asks for "no label"
    theirs.save_pretrained(tmp_path)
    out = theirs.double()(x.double(), timestep=t, class_labels=null).sample
    assert out.shape[1] == (4 if learn_sigma else 2)
    torch.testing.assert_close(out, deepcopy(model).double()(x.double(), t, y), rtol=1e-10, atol=1e-10)
    back = load_dit(tmp_path).eval()
    assert architecture(back) == architecture(model)
    assert all(torch.equal(tensor, back.state_dict()[name]) for name, tensor in model.state_dict().items())


@torch.no_grad()
def test_a_model_made_by_diffusers():
    """With its own epsilon in the second norm; its blocks' embedders are made one, as in every converted DiT."""
    theirs = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=3, out_channels=6, num_layers=3, sample_size=8,
        patch_size=2, num_embeds_ada_norm=5,
    ).eval()  # fmt: skip
    with pytest.raises(CheckpointError, match="blocks 0 and 1 have different"):
        from_diffusers(theirs)
    shared = theirs.transformer_blocks[0].norm1.emb.state_dict()
    for block in theirs.transformer_blocks:
        block.norm1.emb.load_state_dict(shared)
    ours = from_diffusers(perturbed_alike(theirs)).eval()
    x, t, y = torch.randn(3, 3, 8, 8).double(), torch.tensor([0, 250, 999]), torch.tensor([0, 4, 5])
    expected = theirs.double()(x, timestep=t, class_labels=y).sample
    torch.testing.assert_close(ours.double()(x, t, y), expected, rtol=1e-10, atol=1e-10)
    assert ours.blocks[0].norm2.eps == 1e-5


def perturbed_alike(theirs):
    """Make the zero-started parts count, the same in every block's embedder."""
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if ".emb." not in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return theirs


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("table", [False, True])
def test_published_file(wrapped, table, tmp_path):
    """The training script's file has an `argparse.Namespace` beside the weights; sample files are bare."""
    model = model_of(learn_sigma=True)
    weights = model.state_dict()
    if not table:
        del weights["pos_embed"]
    content = {"model": {}, "ema": weights, "args": argparse.Namespace(lr=1e-4)} if wrapped else weights
    torch.save(content, tmp_path / "dit.pt")
    back = load_dit(tmp_path / "dit.pt", num_heads=4, input_size=8).eval()
    assert architecture(back) == architecture(model)
    assert_same(model, back, inputs(model))


def test_saved_file_has_the_published_keys(tmp_path):
    model, other = model_of(), model_of()
    with torch.no_grad():
        other.pos_embed.add_(0)
        other.final_layer.linear.bias.add_(1)
    save_dit(tmp_path / "dit.pt", model, other.state_dict())
    content = torch.load(tmp_path / "dit.pt", weights_only=True)
    assert content.keys() == {"model", "ema"}
    assert "blocks.1.adaLN_modulation.1.weight" in content["model"]
    assert_same(other, load_dit(tmp_path / "dit.pt", num_heads=4).eval(), inputs(model))


def test_learned_positions_stay_learned(tmp_path):
    model = model_of(position="learned")
    save_dit(tmp_path / "dit.pt", model)
    back = load_dit(tmp_path / "dit.pt", num_heads=4).eval()
    assert back.pos_embed.requires_grad
    assert_same(model, back, inputs(model))


def test_architecture_of_published_sizes():
    with torch.device("meta"):
        built = architecture(dit("DiT-S/4"))
    assert (built["num_heads"], built["mlp_ratio"], built["class_dropout_prob"], built["learn_sigma"]) == (6, 4, 0.1, 1)


@pytest.mark.parametrize(
    ("settings", "named"),
    [({}, "timestep_frequencies"), ({"mlp_ratio": 2.0}, "4 x 48"), ({"position": "learned"}, "positions are learned")],
)
def test_what_diffusers_cannot_hold_is_refused(settings, named):
    with pytest.raises(ConfigurationError, match=named):
        to_diffusers(model_of(**settings))


@torch.no_grad()
def test_approximate_differs():
    model = model_of()
    x, t, y = inputs(model, 3)
    assert not torch.allclose(to_diffusers(model, approximate=True)(x, t, y).sample, model(x, t, y), atol=1e-4)


def test_wrong_files_are_named(tmp_path):
    file = tmp_path / "x.pt"
    with pytest.raises(CheckpointError, match="there is no"):
        load_dit(file)
    for damaged in (b"nothing", b".", b"J\0"):  # the last two are pickle's end alone, and half an integer
        file.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="cannot be read"):
            load_dit(file)
    torch.save({"ema": {"conv.weight": torch.zeros(1)}}, file)
    with pytest.raises(CheckpointError, match=r"has no x_embedder\.proj\.weight"):
        load_dit(file)
    save_dit(file, model_of())
    with pytest.raises(CheckpointError, match="width 48"):
        load_dit(file)
    folder = tmp_path / "empty"
    folder.mkdir()
    with pytest.raises(CheckpointError, match="no DiTTransformer2DModel"):
        load_dit(folder)


def test_missing_weights_are_not_left_at_random(tmp_path):
    from safetensors.torch import load_file, save_file

    to_diffusers(model_of(frequency_shift=1)).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    del weights["proj_out_2.bias"]
    save_file(weights, tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(CheckpointError, match=r"proj_out_2\.bias"):
        load_dit(tmp_path)


def test_another_activation_is_refused(tmp_path):
    to_diffusers(model_of(frequency_shift=1)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "activation_fn": "gelu"}))
    with pytest.raises(CheckpointError, match="activation_fn 'gelu'"):
        load_dit(tmp_path)
