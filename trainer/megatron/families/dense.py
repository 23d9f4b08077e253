"""Llama, Qwen2, Qwen3 and GLM4: one MLP a layer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from polyturn.trainer.megatron.families.family import Family, HFConfig
from polyturn.trainer.megatron.families.mapping import ATTENTION, DENSE_MLP, EMBEDDINGS, Mapped


def grouped_query_settings(hf: HFConfig) -> dict[str, Any]:
    """Sizes of grouped-query attention and of the dense MLP."""
    return {
        "num_query_groups": hf.get("num_key_value_heads") or hf["num_attention_heads"],
        "kv_channels": hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"],
        "ffn_hidden_size": hf["intermediate_size"],
    }


def refuse_biases(hf: HFConfig) -> None:
    if hf.get("mlp_bias") or hf.get("attention_bias"):
        raise ValueError("biases in the attention output or the MLP are not supported")


_DENSE = {**EMBEDDINGS, **ATTENTION, **DENSE_MLP}

LLAMA = Family(model_types=("llama",), settings=grouped_query_settings, rows=_DENSE, refuse=refuse_biases)

QWEN2 = Family(
    model_types=("qwen2",),
    settings=lambda hf: {**grouped_query_settings(hf), "add_qkv_bias": True},
    rows=_DENSE,
)

QWEN3 = Family(
    model_types=("qwen3",),
    settings=lambda hf: {**grouped_query_settings(hf), "qk_layernorm": True},
    rows=_DENSE,
    refuse=refuse_biases,
)


def _glm4_settings(hf: HFConfig) -> dict[str, Any]:
    return {
        **grouped_query_settings(hf),
        "add_qkv_bias": bool(hf.get("attention_bias")),
        "rotary_interleaved": True,
    }


GLM4 = Family(
    model_types=("glm4",),
    settings=_glm4_settings,
    rows={
        **_DENSE,
        "mlp.linear_fc1.weight": replace(
            DENSE_MLP["mlp.linear_fc1.weight"], hf_names=("model.layers.{layer}.mlp.gate_up_proj.weight",)
        ),
        "post_self_attn_layernorm.weight": Mapped(
            hf_names=("model.layers.{layer}.post_self_attn_layernorm.weight",)
        ),
        "post_mlp_layernorm.weight": Mapped(hf_names=("model.layers.{layer}.post_mlp_layernorm.weight",)),
    },
    rotary_percent=0.5,
    sandwich_norms=True,
)
"""arXiv 2406.12793; the norms around each block and interleaved rotary pairs set it apart."""
