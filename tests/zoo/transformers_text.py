"""transformers: language models."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf
from transformers_sizes import GROUPED, HIDDEN, SIZES

from zoo import B, entry, next_token, same_token, tokens


def causal(
    name: str, config: Any, /, *, quick: bool = False, note: str = "", experts: str | None = None, **sizes: Any
) -> None:
    """Register a decoder that predicts each next token; `experts` names transformers' way to run experts."""

    options = {"experts_implementation": experts} if experts else {}

    @entry("transformers", name, "token ids", quick=quick, note=note)
    def build():
        model, ids = hf.AutoModelForCausalLM.from_config(config(**{**SIZES, **sizes}), **options), tokens()
        return model, next_token(lambda: model(input_ids=ids, use_cache=False).logits, ids)


def masked(name: str, config: Any, /, *, quick: bool = False, note: str = "", **sizes: Any) -> None:
    """Register an encoder that predicts the tokens; the second example is padded."""

    @entry("transformers", name, "token ids, attention mask", quick=quick, note=note)
    def build():
        model, ids = hf.AutoModelForMaskedLM.from_config(config(**{**SIZES, **sizes})), tokens()
        mask = torch.ones(B, 6, dtype=torch.long)
        mask[1, 4:] = 0
        return model, same_token(lambda: model(input_ids=ids, attention_mask=mask).logits, ids)


def translation(name: str, config: Any, /, *, quick: bool = False, **sizes: Any) -> None:
    """Register an encoder and decoder."""

    @entry("transformers", name, "token ids, decoder's token ids", quick=quick)
    def build():
        model = hf.AutoModelForSeq2SeqLM.from_config(config(**{**SIZES, **sizes}))
        ids, answer = tokens(), tokens(5)
        return model, next_token(lambda: model(input_ids=ids, decoder_input_ids=answer, use_cache=False).logits, answer)


causal("GPT-2", hf.GPT2Config, quick=True, n_embd=16, n_layer=2, n_head=2, n_positions=16)
causal("Llama", hf.LlamaConfig, quick=True, **GROUPED, attention_dropout=0.1)
causal("Mistral", hf.MistralConfig, quick=True, **GROUPED, attention_dropout=0.1, sliding_window=3)
causal("Qwen2", hf.Qwen2Config, **GROUPED, attention_dropout=0.1)
causal("Qwen3", hf.Qwen3Config, quick=True, **GROUPED, head_dim=8, attention_dropout=0.1)
causal("Gemma", hf.GemmaConfig, **GROUPED, head_dim=8, attention_dropout=0.1)
causal("Gemma 2", hf.Gemma2Config, **GROUPED, head_dim=8, attention_dropout=0.1, sliding_window=3)
causal(
    "Gemma 3 (text)", hf.Gemma3TextConfig, quick=True, **GROUPED, head_dim=8, attention_dropout=0.1, sliding_window=3
)
causal("OPT", hf.OPTConfig, ffn_dim=24, word_embed_proj_dim=16, dropout=0.2, layerdrop=0.1)
causal("GPT-NeoX", hf.GPTNeoXConfig, quick=True, hidden_dropout=0.1, attention_dropout=0.1)
causal(
    "GPT-Neo",
    hf.GPTNeoConfig,
    num_layers=2,
    num_heads=2,
    attention_types=[[["global", "local"], 1]],
    window_size=3,
    resid_dropout=0.1,
    embed_dropout=0.1,
    attention_dropout=0.1,
)
causal("GPT-J", hf.GPTJConfig, n_embd=16, n_layer=2, n_head=2, n_positions=16, rotary_dim=4, resid_pdrop=0.1)
causal(
    "CodeGen",
    hf.CodeGenConfig,
    n_embd=32,
    n_layer=2,
    num_attention_heads=4,
    n_positions=16,
    rotary_dim=4,
    resid_pdrop=0.1,
)
causal("Bloom", hf.BloomConfig, quick=True, n_layer=2, n_head=2, hidden_dropout=0.1, attention_dropout=0.1)
causal("Falcon", hf.FalconConfig, hidden_dropout=0.1, attention_dropout=0.1, alibi=True)
causal("Falcon, rotary, multi-query", hf.FalconConfig, hidden_dropout=0.1, attention_dropout=0.1)
causal("MPT", hf.MptConfig, d_model=16, n_heads=2, n_layers=2, max_seq_len=16)
causal("Phi", hf.PhiConfig, quick=True, resid_pdrop=0.1, embd_pdrop=0.1, attention_dropout=0.1)
causal("Phi-3", hf.Phi3Config, **GROUPED, resid_pdrop=0.1, embd_pdrop=0.1)
causal("StableLM", hf.StableLmConfig, **GROUPED, hidden_dropout=0.1, attention_dropout=0.1)
causal("OLMo 2", hf.Olmo2Config, **GROUPED, attention_dropout=0.1)
causal("Cohere", hf.CohereConfig, **GROUPED, attention_dropout=0.1)
causal("Granite", hf.GraniteConfig, **GROUPED, attention_dropout=0.1)
causal("StarCoder2", hf.Starcoder2Config, **GROUPED, residual_dropout=0.1, embedding_dropout=0.1)
causal("SmolLM3", hf.SmolLM3Config, **GROUPED, attention_dropout=0.1)
causal("Nemotron", hf.NemotronConfig, **GROUPED, attention_dropout=0.1)
causal("GLM", hf.GlmConfig, **GROUPED, head_dim=8, attention_dropout=0.1)
causal("XGLM", hf.XGLMConfig, d_model=16, ffn_dim=24, num_layers=2, attention_heads=2, dropout=0.1, layerdrop=0.1)
causal("BioGPT", hf.BioGptConfig, **HIDDEN, layerdrop=0.1)
causal("CTRL", hf.CTRLConfig, n_embd=16, dff=24, n_layer=2, n_head=2, n_positions=16)
causal("Mamba", hf.MambaConfig, quick=True, state_size=4, time_step_rank=2)
causal("Mamba 2", hf.Mamba2Config, state_size=4, num_heads=4, head_dim=8, n_groups=1, chunk_size=4)
causal("Falcon-Mamba", hf.FalconMambaConfig, state_size=4, time_step_rank=2)
causal("RWKV", hf.RwkvConfig, attention_hidden_size=16, context_length=16)
causal("RecurrentGemma", hf.RecurrentGemmaConfig, lru_width=16, attention_window_size=4, **GROUPED)
causal(
    "Jamba",
    hf.JambaConfig,
    **GROUPED,
    use_mamba_kernels=False,
    num_experts=2,
    num_experts_per_tok=1,
    expert_layer_period=100,
    expert_layer_offset=99,
    attn_layer_period=2,
    attn_layer_offset=1,
    mamba_d_state=4,
    mamba_dt_rank=2,
)
causal(
    "Zamba2",
    hf.Zamba2Config,
    num_key_value_heads=2,
    mamba_d_state=4,
    mamba_headdim=8,
    mamba_ngroups=1,
    chunk_size=4,
    n_mamba_heads=4,
    use_mamba_kernels=False,
    hybrid_layer_ids=[1],
    layers_block_type=["mamba", "hybrid"],
)

masked("BERT", hf.BertConfig, quick=True, **HIDDEN)
masked("RoBERTa", hf.RobertaConfig, **HIDDEN)
masked("XLM-RoBERTa", hf.XLMRobertaConfig, **HIDDEN)
masked("DistilBERT", hf.DistilBertConfig, quick=True, dim=16, hidden_dim=24, n_layers=2, n_heads=2, dropout=0.2)
masked("Electra", hf.ElectraConfig, embedding_size=8, **HIDDEN)
masked("ALBERT", hf.AlbertConfig, quick=True, embedding_size=8, num_hidden_groups=1, **HIDDEN)
masked("MobileBERT", hf.MobileBertConfig, embedding_size=16, intra_bottleneck_size=16, true_hidden_size=16, **HIDDEN)
masked("SqueezeBERT", hf.SqueezeBertConfig, embedding_size=16, q_groups=2, k_groups=2, v_groups=2, **HIDDEN)
masked("DeBERTa", hf.DebertaConfig, relative_attention=True, pos_att_type=["p2c", "c2p"], **HIDDEN)
masked(
    "DeBERTa v2",
    hf.DebertaV2Config,
    quick=True,
    relative_attention=True,
    pos_att_type=["p2c", "c2p"],
    share_att_key=True,
    norm_rel_ebd="layer_norm",
    position_buckets=4,
    **HIDDEN,
)
masked(
    "ModernBERT",
    hf.ModernBertConfig,
    attention_dropout=0.1,
    mlp_dropout=0.1,
    local_attention=4,
    cls_token_id=1,
    sep_token_id=2,
)
masked("MPNet", hf.MPNetConfig, **HIDDEN)
masked("ConvBERT", hf.ConvBertConfig, embedding_size=16, conv_kernel_size=3, **HIDDEN)
masked("RoFormer", hf.RoFormerConfig, **HIDDEN)
masked("ESM", hf.EsmConfig, mask_token_id=3, **HIDDEN)
masked("FNet", hf.FNetConfig, hidden_dropout_prob=0.2)

translation(
    "T5",
    hf.T5Config,
    quick=True,
    d_model=16,
    d_kv=8,
    d_ff=24,
    num_layers=2,
    num_heads=2,
    dropout_rate=0.2,
    decoder_start_token_id=0,
)
translation(
    "mT5 (gated)",
    hf.MT5Config,
    d_model=16,
    d_kv=8,
    d_ff=24,
    num_layers=2,
    num_heads=2,
    dropout_rate=0.2,
    feed_forward_proj="gated-gelu",
    decoder_start_token_id=0,
)
PAIR = {
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "decoder_start_token_id": 2,
    "dropout": 0.2,
    "attention_dropout": 0.1,
    "encoder_layerdrop": 0.1,
    "decoder_layerdrop": 0.1,
}
translation("BART", hf.BartConfig, quick=True, **PAIR)
translation("mBART", hf.MBartConfig, **PAIR)
translation("Pegasus", hf.PegasusConfig, **PAIR)
translation("Marian", hf.MarianConfig, **PAIR)
translation("M2M-100", hf.M2M100Config, **PAIR)
translation(
    "LED",
    hf.LEDConfig,
    **PAIR,
    attention_window=[4, 4],
    max_encoder_position_embeddings=16,
    max_decoder_position_embeddings=16,
)


def checkpointed(name: str, config: Any, kind: Any, **sizes: Any) -> None:
    """Register a model that keeps its layers' inputs alone and runs the layers again in backward."""

    @entry("transformers", f"{name}, activation checkpoints", "token ids")
    def build():
        model, ids = kind(config(**{**SIZES, **sizes})), tokens()
        model.gradient_checkpointing_enable()
        given = {"input_ids": ids, "decoder_input_ids": ids} if name == "T5" else {"input_ids": ids}
        return model, next_token(lambda: model(**given, use_cache=False).logits, ids)


checkpointed("Llama", hf.LlamaConfig, hf.LlamaForCausalLM, **GROUPED, attention_dropout=0.1)
checkpointed(
    "T5",
    hf.T5Config,
    hf.T5ForConditionalGeneration,
    d_model=16,
    d_kv=8,
    d_ff=24,
    num_layers=2,
    num_heads=2,
    dropout_rate=0.2,
    decoder_start_token_id=0,
)
