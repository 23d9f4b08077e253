"""Keys of a Hugging Face config that change what some model computes, and model types of which the trainer knows what
it lacks.

A config.json may carry a key that its own family does not read: a fine-tuning script's, a merge's, a modified model's.
transformers ignores it, an engine may not, and nobody would see that policy and trainer differ. So a key that the
modelling code of any decoder-only family reads is understood by the model's own family, known to make no difference,
or refused by name. Keys that no such code reads do nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

INERT = frozenset(
    {
        "_attn_implementation",
        "attention_dropout",
        "attn_pdrop",
        "bos_token_id",
        "chunk_size_feed_forward",
        "dtype",
        "embd_pdrop",
        "eos_token_id",
        "gradient_checkpointing",
        "initializer_range",
        "is_decoder",
        "is_encoder_decoder",
        "num_logits_to_keep",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "pad_token_id",
        "pretraining_tp",
        "problem_type",
        "resid_pdrop",
        "residual_dropout",
        "return_dict",
        "router_aux_loss_coef",
        "router_jitter_noise",
        "use_cache",
        "z_loss_coefficient",
    }
)
"""What dropout in pre-training was, how weights began, token ids, and what the model returns beside its logits."""

UNDERSTOOD = frozenset(
    {
        "attention_bias",
        "decoder_sparse_step",
        "first_k_dense_replace",
        "head_dim",
        "hidden_act",
        "hidden_size",
        "intermediate_size",
        "kv_lora_rank",
        "layer_types",
        "max_position_embeddings",
        "mlp_bias",
        "mlp_only_layers",
        "moe_intermediate_size",
        "n_group",
        "n_routed_experts",
        "n_shared_experts",
        "norm_topk_prob",
        "num_attention_heads",
        "num_experts",
        "num_experts_per_tok",
        "num_hidden_layers",
        "num_key_value_heads",
        "num_local_experts",
        "num_nextn_predict_layers",
        "q_lora_rank",
        "qk_head_dim",
        "qk_nope_head_dim",
        "qk_rope_head_dim",
        "rms_norm_eps",
        "rope_interleave",
        "rope_parameters",
        "routed_scaling_factor",
        "scoring_func",
        "tie_word_embeddings",
        "topk_group",
        "topk_method",
        "use_sliding_window",
        "v_head_dim",
        "vocab_size",
    }
)
"""Read or refused in `families`, whichever the family; or a size that another key says, too."""

_ONE = (1, 1.0)
"""A factor that changes nothing."""

_SCALES = """attention_in_multiplier attention_multiplier attention_out_multiplier attention_value_scale dim_model_base
    embedding_multiplier embedding_scale key_multiplier lm_head_multiplier logit_scale logits_scaling
    logits_mup_width_multiplier mlp_multipliers moe_routed_scaling_factor moe_router_scaling_factor
    query_pre_attn_scalar
    residual_multiplier residual_weight route_scale router_scaling_factor scale_depth scale_emb scale_embedding
    ssm_in_multiplier ssm_multipliers ssm_out_multiplier"""
_GROUPS: tuple[tuple[str, str], ...] = (
    ("a factor on embeddings, attention, residuals or logits", _SCALES),
    (
        "a cap on scores, logits or activations",
        """attention_logit_cap attn_logit_softcapping clip_qkv final_logit_softcapping logits_soft_cap
    moe_router_logit_softcapping output_logit_soft_cap router_logit_softcapping swiglu_alpha swiglu_limit swiglu_limits
    swiglu_limits_shared""",
    ),
    (
        "attention that is not over the whole context",
        """attention_chunk_size index_block_size index_head_dim index_local_blocks index_n_heads index_topk
    index_topk_blocks indexer_budget indexer_compress_ratio indexer_head_dim indexer_kv_heads indexer_n_heads
    indexer_types compress_rates sliding_window sliding_window_pattern sliding_window_size use_bidirectional_attention
    window_size""",
    ),
    (
        "positions that are not rotated alike in every layer",
        """alibi attn_scale attn_temperature_tuning floor_scale layer_rope_theta llama_4_scaling_beta log_scaling_alpha
    log_scaling_n_floor no_rope_layer_interval no_rope_layers original_max_position_embeddings rotary_dim
    use_mem_rope""",
    ),
    (
        "biases",
        """add_bias_linear attention_out_bias bias enable_bias lm_head_bias norm_bias qkv_bias router_bias use_bias
    use_qkv_bias""",
    ),
    ("a gate on the attention's output", "attn_output_gate gated_norm_rank gating output_gate_type"),
    (
        "norms elsewhere or of another kind",
        """hidden_activation layer_norm_eps layer_norm_epsilon norm_eps norm_epsilon parallel_attn pre_norm
    qk_layernorm qk_norm use_parallel_residual use_post_norm use_qk_norm""",
    ),
    (
        "layers without attention",
        """block_auto_adjust_ff_dim block_ffn_dim_multiplier block_multiple_of chunk_size conv_L_cache conv_bias
    conv_kernel hybrid_layer_ids hybrid_override_pattern layers_block_type linear_conv_kernel_dim linear_head_dim
    linear_key_head_dim linear_num_heads linear_num_key_heads linear_num_value_heads linear_value_head_dim
    mamba_chunk_size mamba_conv_bias mamba_d_conv mamba_d_head mamba_d_ssm mamba_d_state mamba_expand mamba_head_dim
    mamba_hidden_act mamba_n_groups mamba_n_heads mamba_norm_before_gate mamba_num_heads mamba_proj_bias mamba_rms_norm
    n_groups projectors_bias ssm_state_size time_step_floor time_step_limit time_step_max time_step_min use_conv_bias
    use_mamba_kernels rescale_prenorm_residual mlp_hidden_act""",
    ),
    (
        "experts laid out otherwise",
        """enable_moe_fp32_combine expert_ffn_hidden_size intermediate_size_mlp mlp_layer_types moe_latent_size
    moe_layer_end_index moe_layer_interval moe_layer_start_index moe_layers moe_norm_min moe_num_experts
    moe_num_shared_experts moe_shared_expert_intermediate_size moe_topk num_shared_experts share_expert_dim
    shared_expert_intermediate_size use_expert_bias zero_expert_num""",
    ),
    (
        "a layer unlike the others, or more than a decoder",
        """audio_config attention_k_eq_v hidden_size_per_layer_input num_kv_shared_layers num_layers per_layer_config
    text_config use_double_wide_mlp vision_config""",
    ),
)
FEATURES: Mapping[str, str] = {key: words for words, keys in _GROUPS for key in keys.split()}
"""Key -> what it brings into a model."""
_FACTORS = frozenset(_SCALES.split())


def refuse_unread(hf: Mapping[str, Any], *, reads: Collection[str], source: str) -> None:
    """
    Args:
        reads: the features that the model's family computes, or refuses itself.
        source: where the config is from, for messages.

    Raises:
        ValueError: a feature is set that the model's family does not have; names the key.
    """
    for key in hf:
        if key not in FEATURES or key in reads:
            continue
        value = hf[key]
        if not value or (key in _FACTORS and value in _ONE):
            continue
        raise ValueError(
            f"{source} has {key}={value!r:.60} ({FEATURES[key]}), which the trainer does not compute for model_type "
            f"{hf.get('model_type')!r}: what it trains would not be what an engine serves"
        )


LACKING: Mapping[str, tuple[str, str]] = {
    "cohere": ("logit_scale", "scaled logits and blocks beside each other"),
    "cohere2": ("sliding_window", "sliding windows, layers without positions and scaled logits"),
    "deepseek_v2": ("topk_method", "routing by softmax over groups of experts"),
    "deepseek_v32": ("index_topk", "the indexer that chooses which keys a token attends to"),
    "deepseek_v4": ("index_topk", "compressed attention and the indexer that chooses its keys"),
    "ernie4_5_moe": ("moe_layer_start_index", "experts chosen by corrected softmax scores"),
    "exaone4": ("sliding_window_pattern", "sliding windows, and norms behind the blocks alone"),
    "falcon_h1": ("mamba_d_ssm", "Mamba beside attention in each layer"),
    "gemma": ("hidden_act", "norms with weights around 0, scaled embeddings and GeGLU"),
    "gemma2": ("attn_logit_softcapping", "soft caps on scores and logits, and sliding windows"),
    "gemma3": ("vision_config", "a decoder within a model of images, with sliding windows"),
    "gemma3_text": (
        "sliding_window",
        "sliding windows with a rope of their own, and norms with weights around 0",
    ),
    "glm_moe_dsa": ("index_topk", "the indexer that chooses which keys a token attends to"),
    "gpt_oss": ("swiglu_limit", "attention sinks, sliding windows in every other layer and a clamped SwiGLU"),
    "granite": ("residual_multiplier", "factors on embeddings, scores, residuals and logits"),
    "granitemoe": ("residual_multiplier", "factors on embeddings, scores, residuals and logits"),
    "hunyuan_v1_dense": ("model_type", "norms of queries and keys behind their rotation"),
    "hunyuan_v1_moe": ("model_type", "norms of queries and keys behind their rotation"),
    "kimi_linear": ("linear_num_heads", "linear attention (Kimi delta attention) in most layers"),
    "lfm2": ("conv_L_cache", "convolutions in place of attention in most layers"),
    "llama4": ("vision_config", "a decoder within a model of images"),
    "llama4_text": (
        "attention_chunk_size",
        "attention in chunks, layers without positions and tempered queries",
    ),
    "minimax": ("layer_types", "lightning attention in most layers"),
    "minimax_m2": ("model_type", "norms over all heads of queries and keys together"),
    "ministral": ("sliding_window", "sliding windows in some layers"),
    "ministral3": ("rope_parameters", "queries scaled by their position (llama_4_scaling_beta)"),
    "mistral3": ("vision_config", "a decoder within a model of images"),
    "mistral4": ("rope_parameters", "queries scaled by their position (llama_4_scaling_beta)"),
    "mixtral": ("num_local_experts", "weights of experts by Mixtral's names"),
    "nemotron": ("hidden_act", "squared ReLU, and LayerNorm with weights around 0"),
    "nemotron_h": ("mamba_num_heads", "Mamba layers"),
    "olmo2": ("model_type", "norms behind the blocks alone, and over all heads together"),
    "olmo3": (
        "sliding_window",
        "sliding windows, and norms behind the blocks alone and over all heads together",
    ),
    "phi3": ("original_max_position_embeddings", "one matrix for queries, keys and values, and longrope"),
    "qwen2_moe": ("shared_expert_intermediate_size", "a gate on the shared expert"),
    "qwen3_5": ("vision_config", "a decoder within a model of images, with linear attention"),
    "qwen3_5_moe": ("vision_config", "a decoder within a model of images, with linear attention"),
    "qwen3_5_moe_text": ("linear_num_value_heads", "linear attention (gated delta net) in most layers"),
    "qwen3_5_text": ("linear_num_value_heads", "linear attention (gated delta net) in most layers"),
    "qwen3_next": (
        "linear_num_value_heads",
        "linear attention (gated delta net) in most layers, and gates on the attention's output",
    ),
    "qwen3_vl": ("vision_config", "a decoder within a model of images"),
    "qwen3_vl_moe": ("vision_config", "a decoder within a model of images"),
}
"""`model_type` -> the line of its config that says so (`model_type` itself, where no other does), and what the trainer
lacks."""


def explain_lacking(model_type: str) -> str:
    """What a model type would need, as the end of a sentence; empty where nothing is known."""
    if model_type not in LACKING:
        return ""
    key, what = LACKING[model_type]
    return f" (it needs {what}: '{key}' in config.json)"
