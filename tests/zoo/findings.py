"""What is not yet as it should be, by reason: the tests expect these models to fail, and fail once they do not."""

from __future__ import annotations

from zoo import Entry

FINDINGS: dict[str, tuple[str, ...]] = {
    "silently wrong: a custom autograd.Function adds a gradient of its own in backward, a statistic of the batch": (
        "diffusers HiDream (experts), load balancing in training",
    ),
    "silently wrong: an in-place operation on the output of a linear layer with bias on 3-D input": ("timm NaFlexViT",),
    "batch_norm of a weight alone (weight standardisation) is no statistic of examples": (
        "timm ResNetV2 (BiT)",
        "timm NFNet",
        "transformers BiT (weight standardisation)",
    ),
    "a frozen parameter is no example": (
        "transformers ViT-MAE",
        "peft DoRA on Llama",
        "peft DoRA on GPT-2",
        "peft DoRA on ViT",
        "peft DoRA on SD3",
    ),
    "a parameter takes only its dtype from the examples": (
        "peft BOFT on Llama",
        "peft BOFT on ViT",
        "diffusers Cosmos",
    ),
    "a constant tensor that was made before the recording, and is no buffer, is taken for examples": (
        "transformers BEiT",
        "peft FourierFT on Llama",
        "peft FourierFT on ViT",
        "peft Prompt tuning on Llama",
    ),
    "a parameter written into rows that a mask picks": (
        "transformers Wav2Vec2",
        "transformers Wav2Vec2, layer norm",
        "transformers HuBERT",
        "transformers WavLM",
        "transformers UniSpeech-SAT",
        "transformers Data2Vec audio",
    ),
    "a custom autograd.Function of parameters alone": ("peft LoHa on Llama", "peft LoHa on ViT"),
    "experts in a loop: each sees as many rows as chose it, and a slice of one parameter": (
        "transformers Mixtral, experts in a loop",
        "transformers Qwen2-MoE, experts in a loop",
        "transformers Qwen3-MoE, experts in a loop",
        "transformers OLMoE, experts in a loop",
        "transformers PhiMoE, experts in a loop",
        "transformers GraniteMoE, experts in a loop",
        "transformers gpt-oss, experts in a loop",
        "transformers DeepSeek-V3, experts in a loop",
        "transformers Jamba, Mamba and experts in a loop",
    ),
}


def finding(chosen: Entry) -> str:
    """Why the entry is not exact yet; empty if nothing is known."""
    full_name = f"{chosen.library} {chosen.name}"
    return next((reason for reason, names in FINDINGS.items() if full_name in names), "")
