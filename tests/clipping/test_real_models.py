"""Real models, built from config with small random weights, unmodified, against one example at a time in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import dither
import oracle

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
B = 3


def _dit():
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        sample_size=8,
        num_embeds_ada_norm=10,
        norm_num_groups=4,
    )
    x, t, y = torch.randn(B, 4, 8, 8), torch.randint(1000, (B,)), torch.randint(10, (B,))
    return model, lambda: model(x, timestep=t, class_labels=y, return_dict=False)[0]


def _unet():
    model = diffusers.UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
    )
    x = torch.randn(B, 3, 8, 8).to(memory_format=torch.channels_last)
    t = torch.randint(1000, (B,))
    return model, lambda: model(x, t).sample


def _llama():
    config = transformers.LlamaConfig(
        vocab_size=37,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    model = transformers.LlamaForCausalLM(config)
    ids = torch.randint(37, (B, 6))
    return model, lambda: model(input_ids=ids).logits


def _gpt2():
    config = transformers.GPT2Config(vocab_size=37, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    model = transformers.GPT2LMHeadModel(config)  # head and table tied, dropout on
    ids = torch.randint(37, (B, 6))
    return model, lambda: model(input_ids=ids).logits


def _vit():
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        image_size=8,
        patch_size=4,
        hidden_dropout_prob=0.2,
        num_labels=5,
    )
    model = transformers.ViTForImageClassification(config)
    x = torch.randn(B, 3, 8, 8)
    return model, lambda: model(pixel_values=x).logits


@pytest.mark.parametrize("build", [_dit, _unet, _llama, _gpt2, _vit])
def test_real_model(build):
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    try:
        model, forward = build()
        model.train()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)

        def loss_fn():
            torch.manual_seed(1)
            return F.softplus(forward()).flatten(1).mean(1)

        truth = oracle.per_example_gradients(model, loss_fn)
        bound = float(oracle.norms(truth).median())
        expected = oracle.clipped_sum(truth, bound)
        for strategy in ("auto", "hold", "ghost", "tile", "two_pass"):
            result = dither.clipped_sum(model, loss_fn, max_grad_norm=bound, strategy=strategy)
            assert oracle.relative_error(result.gradients, expected) <= 1e-10, strategy
    finally:
        torch.set_default_dtype(torch.float32)
