"""Families with multi-head latent attention: DeepSeek V3 and R1, Kimi K2, Moonlight."""

from __future__ import annotations

from typing import Any

from polyturn.trainer.megatron.families.dense import refuse_biases
from polyturn.trainer.megatron.families.experts import (
    corrected_router_settings,
    expert_settings,
    refuse_routers,
)
from polyturn.trainer.megatron.families.family import Family, HFConfig
from polyturn.trainer.megatron.families.mapping import (
    CORRECTED_ROUTER,
    DENSE_MLP,
    EMBEDDINGS,
    EXPERTS,
    LATENT_ATTENTION,
    SHARED_EXPERTS,
)
from polyturn.trainer.megatron.families.rope import YarnScaling, read_rope


def _settings(hf: HFConfig) -> dict[str, Any]:
    rope = read_rope(hf)
    settings: dict[str, Any] = {
        "multi_latent_attention": True,
        "q_lora_rank": hf.get("q_lora_rank"),
        "kv_lora_rank": hf["kv_lora_rank"],
        "qk_head_dim": hf["qk_nope_head_dim"],
        "qk_pos_emb_head_dim": hf["qk_rope_head_dim"],
        "v_head_dim": hf["v_head_dim"],
        "qk_layernorm": True,
        "num_query_groups": hf["num_attention_heads"],
        "ffn_hidden_size": hf["intermediate_size"],
        "rotary_base": rope.base,
        "rope_type": "rope",
        "rotary_scaling_factor": 1.0,
        **expert_settings(hf),
        **corrected_router_settings(hf),
    }
    if isinstance(rope.scaling, YarnScaling):
        settings |= {
            "rope_type": "yarn",
            "rotary_scaling_factor": rope.scaling.factor,
            "original_max_position_embeddings": rope.scaling.original_positions,
            "beta_fast": rope.scaling.beta_fast,
            "beta_slow": rope.scaling.beta_slow,
            "mscale": rope.scaling.mscale,
            "mscale_all_dim": rope.scaling.mscale_all_dim,
        }
    return settings


def _refuse(hf: HFConfig) -> None:
    refuse_biases(hf)
    refuse_routers(hf)
    if not hf.get("rope_interleave", True):
        raise ValueError("latent attention with rope_interleave off is not supported")
    scaling = read_rope(hf).scaling
    if scaling is not None and not isinstance(scaling, YarnScaling):
        raise ValueError("latent attention is supported with rope type 'default' or 'yarn'")


LATENT = Family(
    model_types=("deepseek_v3", "kimi_k2"),
    settings=_settings,
    rows={
        **EMBEDDINGS,
        **LATENT_ATTENTION,
        **DENSE_MLP,
        **EXPERTS,
        **CORRECTED_ROUTER,
        **SHARED_EXPERTS,
    },
    refuse=_refuse,
    required=(
        "kv_lora_rank",
        "n_group",
        "n_routed_experts",
        "num_experts_per_tok",
        "routed_scaling_factor",
        "topk_group",
    ),
    # The norms of the latents take no epsilon from the config.
    latent_norm_epsilon=1e-6,
)
"""arXiv 2412.19437; Kimi K2 (arXiv 2507.20534) and Moonlight (arXiv 2502.16982) have its form."""
