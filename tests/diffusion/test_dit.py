"""The diffusion transformer: shapes, published names and sizes, conditioning, label dropout."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from denoisers import perturbed

from dither.diffusion import DiT, DiTModelWithFlashAttention, dit
from dither.diffusion.embeddings import position_sinusoids, timestep_sinusoids
from dither.errors import ConfigurationError, LabelError


def inputs(batch=3):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 1, 8, 8, generator=generator)
    return x, torch.arange(batch) * 100, torch.arange(batch) % 10


@pytest.mark.parametrize("patch_size", [1, 2, 4, 8])
@pytest.mark.parametrize("learn_sigma", [False, True])
def test_shape_and_zero_init(patch_size, learn_sigma):
    model = dit("DiT-tiny", patch_size=patch_size, learn_sigma=learn_sigma)
    x, t, y = inputs()
    out = model(x, t, y)
    assert out.shape == (3, 2 if learn_sigma else 1, 8, 8)
    assert not out.any()


def test_by_keyword_equals_by_position():
    model = perturbed(dit("DiT-tiny")).eval()
    x, t, y = inputs()
    torch.testing.assert_close(model(y=y, x=x, t=t), model(x, t, y))


def test_empty_batch():
    assert dit("DiT-tiny")(*(tensor[:0] for tensor in inputs())).shape == (0, 1, 8, 8)


def test_every_input_matters_after_perturbation():
    model = perturbed(dit("DiT-tiny")).eval()
    x, t, y = inputs()
    out = model(x, t, y)
    for other in (model(x + 1, t, y), model(x, t + 100, y), model(x, t, (y + 1) % 10)):
        assert not torch.allclose(out, other, atol=1e-4)


def test_examples_do_not_mix():
    model = perturbed(dit("DiT-tiny")).eval()
    x, t, y = inputs()
    torch.testing.assert_close(model(x, t, y)[1:2], model(x[1:2], t[1:2], y[1:2]))


def test_tokens_go_back_where_they_came_from():
    """A patch projection and its inverse leave the image as it was."""
    model = dit("DiT-tiny", patch_size=2, in_channels=3, hidden_size=12)
    x = torch.randn(2, 3, 8, 8)
    patches = F.unfold(x, 2, stride=2).transpose(1, 2)  # (B, T, C p p)
    as_cells = patches.reshape(2, 16, 3, 4).transpose(2, 3).reshape(2, 16, 12)
    torch.testing.assert_close(model._unpatchify(as_cells), x)


def test_state_dict_names():
    names = set(dit("DiT-tiny").state_dict())
    for name in (
        "pos_embed", "x_embedder.proj.weight", "x_embedder.proj.bias", "t_embedder.mlp.0.weight",
        "t_embedder.mlp.2.bias", "y_embedder.embedding_table.weight", "blocks.1.attn.qkv.weight",
        "blocks.0.attn.proj.bias", "blocks.0.mlp.fc1.weight", "blocks.0.mlp.fc2.bias",
        "blocks.0.adaLN_modulation.1.weight", "final_layer.linear.weight", "final_layer.adaLN_modulation.1.bias",
    ):  # fmt: skip
        assert name in names
    assert len(names) == 1 + 2 + 4 + 1 + 2 * 10 + 4


@pytest.mark.parametrize(
    ("name", "count"),
    [("DiT-S/2", 32_963_360), ("DiT-B/2", 130_512_416), ("DiT-L/2", 458_102_816), ("DiT-XL/2", 675_129_632)],
)
def test_published_sizes(name, count):
    with torch.device("meta"):
        model = dit(name)
    assert sum(parameter.numel() for parameter in model.parameters()) == count


@pytest.mark.parametrize("size", ["S", "B", "L", "XL"])
@pytest.mark.parametrize("patch_size", [2, 4, 8])
def test_every_name(size, patch_size):
    with torch.device("meta"):
        assert dit(f"DiT-{size}/{patch_size}", depth=1).patch_size == patch_size


def test_runs_on_meta():
    with torch.device("meta"):
        model = dit("DiT-S/8", depth=1)
        t = torch.zeros(2, dtype=torch.int64)
        assert model(torch.zeros(2, 4, 32, 32), t, t).shape == (2, 8, 32, 32)


def test_position_table():
    assert not DiT(8, 2, 1, 48, 1, 4).pos_embed.requires_grad
    learned = dit("DiT-tiny", position="learned")
    assert learned.pos_embed.requires_grad
    torch.testing.assert_close(learned.pos_embed.detach(), position_sinusoids(48, 4))
    table = position_sinusoids(48, 4)[0].reshape(4, 4, 48)
    assert (table[0, :, :24] == table[3, :, :24]).all()  # first half: column, the same in every row
    assert (table[:, 0, 24:] == table[:, 3, 24:]).all()


def test_timestep_sinusoids():
    table = timestep_sinusoids(torch.tensor([0, 7]), 256)
    assert (table[0, :128] == 1).all() and (table[0, 128:] == 0).all()
    torch.testing.assert_close(table[1, 0], torch.tensor(7.0).cos())
    assert timestep_sinusoids(torch.tensor([3]), 7).shape == (1, 7)


def test_label_dropout_is_drawn_once_per_row_and_only_in_training():
    model = perturbed(dit("DiT-tiny", class_dropout_prob=0.5))
    x, t, _ = inputs(1)
    x, t, y = x.expand(64, -1, -1, -1), t.expand(64), torch.zeros(64, dtype=torch.int64)
    model.train()
    distinct = model(x, t, y).flatten(1).detach().mul(1e4).round().unique(dim=0)
    assert len(distinct) == 2
    model.eval()
    shown = model(x, t, y)
    torch.testing.assert_close(shown, model(x, t, y, drop_label=torch.zeros(64, dtype=torch.bool)))
    hidden = model(x, t, y, drop_label=torch.ones(64, dtype=torch.bool))
    torch.testing.assert_close(hidden, model(x, t, torch.full_like(y, 10)))
    assert not torch.allclose(shown, hidden)


def test_given_mask_draws_nothing():
    model = dit("DiT-tiny").train()
    x, t, y = inputs()
    state = torch.get_rng_state()
    model(x, t, y, drop_label=torch.tensor([True, False, True]))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("label", [-1, 11])
def test_label_outside_range(label):
    model = dit("DiT-tiny")
    x, t, _ = inputs(1)
    with pytest.raises(LabelError, match=str(label)):
        model(x, t, torch.tensor([label]))


def test_no_row_for_no_label():
    model = dit("DiT-tiny", class_dropout_prob=0.0)
    assert model.y_embedder.embedding_table.num_embeddings == 10
    x, t, y = inputs()
    model(x, t, y, drop_label=torch.zeros(3, dtype=torch.bool))
    with pytest.raises(ConfigurationError, match="class_dropout_prob"):
        model(x, t, y, drop_label=torch.ones(3, dtype=torch.bool))


@pytest.mark.parametrize(
    "wrong", [{"patch_size": 3}, {"num_heads": 5}, {"position": "rotary"}, {"hidden_size": 42, "num_heads": 2}]
)
def test_wrong_sizes_are_named(wrong):
    with pytest.raises(ConfigurationError, match="Fix:"):
        dit("DiT-tiny", **wrong)


def test_wrong_image_and_name():
    with pytest.raises(ConfigurationError, match="DiT-XL/2"):
        dit("DiT-XXL/2")
    with pytest.raises(ConfigurationError, match="shape"):
        dit("DiT-tiny")(torch.zeros(1, 1, 16, 16), torch.zeros(1), torch.zeros(1, dtype=torch.int64))


def test_flash_constructor_trains_as_in_the_seed():
    model = DiTModelWithFlashAttention(
        img_size=16, patch_size=4, in_channels=3, embed_dim=32, depth=1, num_heads=2, num_classes=4
    )
    x, t, y = torch.randn(2, 3, 16, 16), torch.tensor([1, 2]), torch.tensor([0, 3])
    F.mse_loss(model(x, t, y), torch.randn_like(x)).backward()
    assert isinstance(model, DiT) and model.pos_embed.requires_grad
    assert model.final_layer.linear.weight.grad is not None
    with pytest.raises(ConfigurationError, match="width"):
        DiTModelWithFlashAttention(width=3)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_under_vmap():
    """The oracle may run one example at a time under vmap, where labels cannot be read."""
    model = perturbed(dit("DiT-tiny")).eval()
    x, t, y = inputs()
    one = torch.func.vmap(lambda x, t, y: model(x[None], t[None], y[None])[0])
    torch.testing.assert_close(one(x, t, y), model(x, t, y))


def test_label_std():
    table = dit("DiT-tiny", label_std=1.0).y_embedder.embedding_table.weight
    assert 0.8 < table.std() < 1.2
    assert 0.015 < dit("DiT-tiny").y_embedder.embedding_table.weight.std() < 0.025


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_gradient_under_vmap():
    """Where torch.func.grad is inside vmap, labels arrive wrapped once more."""
    model = perturbed(dit("DiT-tiny")).eval()
    parameters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def loss(parameters, x, t, y):
        return torch.func.functional_call(model, parameters, (x[None], t[None], y[None])).square().sum()

    x, t, y = inputs()
    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0, 0))(parameters, x, t, y)
    alone = torch.func.grad(loss)(parameters, x[0], t[0], y[0])
    for name, gradient in alone.items():
        torch.testing.assert_close(each[name][0], gradient, rtol=1e-4, atol=1e-4)
