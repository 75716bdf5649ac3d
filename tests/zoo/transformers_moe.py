"""transformers: mixtures of experts. The loss is the tokens' cross-entropy alone, except in the last rows."""

from __future__ import annotations

from typing import Any

import transformers as hf
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from transformers_sizes import GROUPED, SIZES
from transformers_text import causal

from zoo import entry, next_token, tokens

EXPERTS = {"num_experts_per_tok": 2, "router_aux_loss_coef": 0.0, "attention_dropout": 0.1}
LOOP = {**GROUPED, "experts": "eager"}
BATCHED = {**GROUPED, "experts": "batched_mm"}

causal("Mixtral, experts in a loop", hf.MixtralConfig, quick=True, **LOOP, **EXPERTS, num_local_experts=4)
causal(
    "Qwen2-MoE, experts in a loop",
    hf.Qwen2MoeConfig,
    **LOOP,
    **EXPERTS,
    num_experts=4,
    moe_intermediate_size=8,
    shared_expert_intermediate_size=8,
)
causal(
    "Qwen3-MoE, experts in a loop",
    hf.Qwen3MoeConfig,
    **LOOP,
    **EXPERTS,
    num_experts=4,
    moe_intermediate_size=8,
    head_dim=8,
)
causal("OLMoE, experts in a loop", hf.OlmoeConfig, num_key_value_heads=2, experts="eager", **EXPERTS, num_experts=4)
causal("PhiMoE, experts in a loop", hf.PhimoeConfig, **LOOP, **EXPERTS, num_local_experts=4)
causal("GraniteMoE, experts in a loop", hf.GraniteMoeConfig, **LOOP, **EXPERTS, num_local_experts=4)
causal("gpt-oss, experts in a loop", hf.GptOssConfig, **LOOP, **EXPERTS, num_local_experts=4, head_dim=8)
causal(
    "DeepSeek-V3, experts in a loop",
    hf.DeepseekV3Config,
    num_key_value_heads=2,
    experts="eager",
    num_experts_per_tok=2,
    n_routed_experts=4,
    n_group=1,
    topk_group=1,
    moe_intermediate_size=8,
    first_k_dense_replace=1,
    q_lora_rank=8,
    kv_lora_rank=8,
    qk_rope_head_dim=4,
    qk_nope_head_dim=4,
    v_head_dim=8,
)
causal(
    "Jamba, Mamba and experts in a loop",
    hf.JambaConfig,
    **LOOP,
    num_experts=4,
    num_experts_per_tok=2,
    expert_layer_period=2,
    expert_layer_offset=1,
    attn_layer_period=2,
    attn_layer_offset=1,
    mamba_d_state=4,
    mamba_dt_rank=2,
)


causal("Mixtral, experts batched", hf.MixtralConfig, quick=True, **BATCHED, **EXPERTS, num_local_experts=4)
causal(
    "Qwen3-MoE, experts batched",
    hf.Qwen3MoeConfig,
    **BATCHED,
    **EXPERTS,
    num_experts=4,
    moe_intermediate_size=8,
    head_dim=8,
)
causal("gpt-oss, experts batched", hf.GptOssConfig, **BATCHED, **EXPERTS, num_local_experts=4, head_dim=8)


def balanced(name: str, config: Any, **sizes: Any) -> None:
    """Register a mixture whose loss has the load-balancing term, a statistic of all the batch's tokens."""

    @entry("transformers", name, "token ids", quick=True, refused="CoupledExamplesError")
    def build():
        model = hf.AutoModelForCausalLM.from_config(
            config(**{**SIZES, **GROUPED, **EXPERTS, **sizes}), experts_implementation="batched_mm"
        )
        ids = tokens()
        outputs: list[Any] = []

        def forward():
            outputs[:] = [model(input_ids=ids, use_cache=False, output_router_logits=True)]
            return outputs[0].logits

        own = next_token(forward, ids)
        return model, lambda: own() + 0.1 * load_balancing_loss_func(outputs[0].router_logits, 4, 2)


balanced("Mixtral, with the load-balancing loss", hf.MixtralConfig, num_local_experts=4)
