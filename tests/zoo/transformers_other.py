"""transformers: images with text, sound, decisions, time series."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf
from transformers_sizes import GROUPED, HIDDEN, SIZES, VISION

from zoo import B, classification, denoising, entry, images, next_token, tokens


def clip_parts() -> dict[str, Any]:
    text = {**SIZES, "attention_dropout": 0.1}
    return {"text_config": text, "vision_config": {**VISION, "attention_dropout": 0.1}, "projection_dim": 8}


@entry(
    "transformers",
    "CLIP",
    "token ids, images 16x16",
    quick=True,
    note="the loss draws an example's own image and text together: the contrastive loss couples examples",
)
def clip():
    model, ids, x = hf.CLIPModel(hf.CLIPConfig(**clip_parts())), tokens(), images(16)

    def forward():
        output = model(input_ids=ids, pixel_values=x)
        return output.image_embeds, output.text_embeds

    return model, denoising(forward)


@entry("transformers", "CLIP, contrastive loss", "token ids, images 16x16", quick=True, refused="CoupledExamplesError")
def clip_contrastive():
    model, ids, x = hf.CLIPModel(hf.CLIPConfig(**clip_parts())), tokens(), images(16)
    return model, classification(lambda: model(input_ids=ids, pixel_values=x).logits_per_image[:, :B])


@entry("transformers", "SigLIP", "token ids, images 16x16")
def siglip():
    parts = clip_parts()
    parts.pop("projection_dim")
    model, ids, x = hf.SiglipModel(hf.SiglipConfig(**parts)), tokens(), images(16)

    def forward():
        output = model(input_ids=ids, pixel_values=x)
        return output.image_embeds, output.text_embeds

    return model, denoising(forward)


@entry("transformers", "LLaVA", "images 16x16, token ids with image tokens")
def llava():
    text = hf.LlamaConfig(**{**SIZES, "max_position_embeddings": 32}, **GROUPED)
    vision = hf.CLIPVisionConfig(**VISION, projection_dim=8)
    config = hf.LlavaConfig(
        text_config=text,
        vision_config=vision,
        image_token_index=36,
        vision_feature_select_strategy="default",
        vision_feature_layer=-1,
    )
    model, ids, x = hf.LlavaForConditionalGeneration(config), tokens(22, 36), images(16)
    ids[:, 2:18] = 36
    return model, next_token(lambda: model(input_ids=ids, pixel_values=x).logits, ids)


@entry("transformers", "Whisper", "log-mel spectrograms, token ids", quick=True)
def whisper():
    config = hf.WhisperConfig(
        vocab_size=37,
        d_model=16,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        num_mel_bins=8,
        max_source_positions=10,
        max_target_positions=16,
        dropout=0.2,
        encoder_layerdrop=0.1,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=2,
    )
    model, sound, ids = hf.WhisperForConditionalGeneration(config), torch.randn(B, 8, 20), tokens()
    return model, next_token(lambda: model(input_features=sound, decoder_input_ids=ids, use_cache=False).logits, ids)


def speech(name: str, config: Any, **sizes: Any) -> None:
    """Register a classifier of raw sound; SpecAugment masks time steps, drawn by numpy."""

    @entry("transformers", name, "sound waves (160 samples)", quick=name.startswith("Wav2Vec2"))
    def build():
        body = {
            **{k: SIZES[k] for k in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")},
            "num_attention_heads": 2,
            "conv_dim": [8, 8],
            "conv_kernel": [4, 3],
            "conv_stride": [4, 2],
            "num_conv_pos_embeddings": 4,
            "num_conv_pos_embedding_groups": 2,
            "num_labels": 5,
            "classifier_proj_size": 8,
            "mask_time_prob": 0.3,
            "mask_time_length": 2,
            "hidden_dropout": 0.1,
            "feat_proj_dropout": 0.1,
            "layerdrop": 0.1,
        }
        model = hf.AutoModelForAudioClassification.from_config(config(**{**body, **sizes}))
        sound = torch.randn(B, 160)
        return model, classification(lambda: model(input_values=sound).logits)


speech("Wav2Vec2", hf.Wav2Vec2Config)
speech("Wav2Vec2, no masking", hf.Wav2Vec2Config, apply_spec_augment=False)
speech("Wav2Vec2, layer norm", hf.Wav2Vec2Config, feat_extract_norm="layer", do_stable_layer_norm=True, conv_bias=True)
speech("HuBERT", hf.HubertConfig)
speech("HuBERT, no masking", hf.HubertConfig, apply_spec_augment=False)
speech("WavLM", hf.WavLMConfig)
speech("WavLM, no masking", hf.WavLMConfig, apply_spec_augment=False)
speech("UniSpeech-SAT", hf.UniSpeechSatConfig)
speech("Data2Vec audio", hf.Data2VecAudioConfig)
speech("Data2Vec audio, no masking", hf.Data2VecAudioConfig, apply_spec_augment=False)


@entry("transformers", "Audio Spectrogram Transformer", "spectrograms 16x8")
def ast():
    config = hf.ASTConfig(
        **{k: v for k, v in VISION.items() if k != "image_size"},
        **HIDDEN,
        num_labels=5,
        max_length=16,
        num_mel_bins=8,
        frequency_stride=4,
        time_stride=4,
    )
    model, sound = hf.ASTForAudioClassification(config), torch.randn(B, 16, 8)
    return model, classification(lambda: model(input_values=sound).logits)


@entry("transformers", "Decision Transformer", "states, actions, returns")
def decision():
    config = hf.DecisionTransformerConfig(
        vocab_size=1, state_dim=4, act_dim=2, hidden_size=16, max_ep_len=20, n_layer=2, n_head=2, n_positions=64
    )
    model = hf.DecisionTransformerModel(config)
    states, actions, returns = torch.randn(B, 5, 4), torch.randn(B, 5, 2), torch.randn(B, 5, 1)
    steps, mask = torch.arange(5).repeat(B, 1), torch.ones(B, 5)

    def forward():
        return model(
            states=states,
            actions=actions,
            rewards=returns,
            returns_to_go=returns,
            timesteps=steps,
            attention_mask=mask,
            return_dict=False,
        )[:3]

    return model, denoising(forward)


@entry(
    "transformers", "PatchTST", "series (32 steps, 3 channels)", note="batch norm replaced by layer norm (its option)"
)
def patch_tst():
    config = hf.PatchTSTConfig(
        num_input_channels=3,
        context_length=32,
        patch_length=8,
        patch_stride=8,
        d_model=16,
        num_attention_heads=2,
        num_hidden_layers=2,
        ffn_dim=24,
        prediction_length=8,
        norm_type="layernorm",
        loss="mse",
        ff_dropout=0.1,
        positional_dropout=0.1,
    )
    model, x = hf.PatchTSTForPrediction(config), torch.randn(B, 32, 3)
    return model, denoising(lambda: model(past_values=x).prediction_outputs)
