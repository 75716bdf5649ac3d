"""PEFT: adapters on models of the other libraries; the base's own parameters are frozen."""

from __future__ import annotations

from typing import Any

import diffusers
import peft
import torch
import transformers as hf
from torch import nn
from transformers_sizes import GROUPED, HIDDEN, SIZES

import dither
from zoo import B, classification, denoising, entry, images, next_token, timesteps, tokens


def llama() -> tuple[nn.Module, Any, list[str]]:
    model, ids = hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, **GROUPED)), tokens()
    return (
        model,
        lambda m: next_token(lambda: m(input_ids=ids, use_cache=False).logits[:, -6:], ids),
        ["q_proj", "v_proj", "down_proj"],
    )


def gpt2() -> tuple[nn.Module, Any, list[str]]:
    model, ids = (
        hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=37, n_embd=16, n_layer=2, n_head=2, n_positions=16)),
        tokens(),
    )
    return model, lambda m: next_token(lambda: m(input_ids=ids, use_cache=False).logits, ids), ["c_attn", "mlp.c_proj"]


def vit() -> tuple[nn.Module, Any, list[str]]:
    config = hf.ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        image_size=16,
        patch_size=4,
        num_labels=5,
        **HIDDEN,
    )
    model, x = hf.ViTForImageClassification(config), images(16)
    targets = [
        n
        for n, m in model.named_modules()
        if isinstance(m, nn.Linear) and ("q" in n.split(".")[-1] or "v" in n.split(".")[-1])
    ]
    return model, lambda m: classification(lambda: m(pixel_values=x).logits), targets


def sd3() -> tuple[nn.Module, Any, list[str]]:
    model = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        caption_projection_dim=16,
        pooled_projection_dim=10,
        out_channels=4,
        pos_embed_max_size=8,
    )
    x, text, pooled, t = images(8, 4), torch.randn(B, 5, 12), torch.randn(B, 10), timesteps()

    def loss(m: nn.Module) -> Any:
        return denoising(
            lambda: m(
                hidden_states=x, encoder_hidden_states=text, pooled_projections=pooled, timestep=t, return_dict=False
            )[0]
        )

    return model, loss, ["to_q", "to_v", "ff.net.0.proj"]


def declare_constants(model: nn.Module) -> None:
    """Say of tensors that an adapter makes once, and holds in a dict of its own, that they are constants."""
    for module in model.modules():
        for held in (vars(module).get("indices"), vars(module).get("prompt_tokens")):
            for name, tensor in (held or {}).items():
                held[name] = dither.constant(tensor)


BASES = {"Llama": llama, "GPT-2": gpt2, "ViT": vit, "SD3": sd3}
DECLARED = "`{}`, no buffer, declared with `dither.constant`"
SPECIAL: dict[Any, dict[str, Any]] = {
    peft.FourierFTConfig: {
        "dtype": torch.float32,
        "bound": 1e-5,
        "note": "float32: the adapter itself does not run in float64; " + DECLARED.format("indices"),
    },
    peft.PromptTuningConfig: {"note": DECLARED.format("prompt_tokens")},
}
"""What differs for some adapters."""
RANK = {"r": 2, "lora_alpha": 4}
QUICK = {
    ("LoRA", "Llama"),
    ("DoRA", "SD3"),
    ("DoRA", "GPT-2"),
    ("LoHa", "ViT"),
    ("FourierFT", "ViT"),
    ("Prompt tuning", "Llama"),
    ("IA3", "ViT"),
}


def register(adapter: str, base: str, config: Any, **options: Any) -> None:
    """Register an adapter on a base model."""

    @entry(
        "peft",
        f"{adapter} on {base}",
        {"ViT": "images 16x16", "SD3": "latents, text, timesteps"}.get(base, "token ids"),
        quick=(adapter, base) in QUICK,
        **SPECIAL.get(config, {}),
    )
    def build():
        model, loss, targets = BASES[base]()
        given = dict(options)
        if config is peft.IA3Config:
            given["feedforward_modules"] = [t for t in targets if "down" in t or "mlp" in t or "ff" in t]
        if config not in (peft.PrefixTuningConfig, peft.PromptTuningConfig):
            given["target_modules"] = targets
        wrapped = peft.get_peft_model(model, config(**given))
        if config in SPECIAL:
            declare_constants(wrapped)
        return wrapped, loss(wrapped)


for base in BASES:
    register("LoRA", base, peft.LoraConfig, **RANK, lora_dropout=0.2)
    register("DoRA", base, peft.LoraConfig, **RANK, use_dora=True, lora_dropout=0.2)
    register("IA3", base, peft.IA3Config)
for base in ("Llama", "ViT"):
    register("rsLoRA", base, peft.LoraConfig, **RANK, use_rslora=True)
    register("LoHa", base, peft.LoHaConfig, r=2, alpha=4, module_dropout=0.0, rank_dropout=0.1)
    register("LoKr", base, peft.LoKrConfig, r=2, alpha=4)
    register("OFT", base, peft.OFTConfig, oft_block_size=4, r=0)
    register("BOFT", base, peft.BOFTConfig, boft_block_size=4)
    register("VeRA", base, peft.VeraConfig, r=2)
    register("AdaLoRA", base, peft.AdaLoraConfig, init_r=2, target_r=2, total_step=10)
    register("FourierFT", base, peft.FourierFTConfig, n_frequency=8)
register("Prompt tuning", "Llama", peft.PromptTuningConfig, task_type="CAUSAL_LM", num_virtual_tokens=2)
register("Prefix tuning", "Llama", peft.PrefixTuningConfig, task_type="CAUSAL_LM", num_virtual_tokens=2)
