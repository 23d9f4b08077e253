"""Families with a mixture of experts: Qwen3-MoE and GLM-4.5, 4.6, 4.7."""

from __future__ import annotations

from typing import Any

from polyturn.configs.sizing.model_shape import expert_layers, num_experts
from polyturn.trainer.megatron.families.dense import grouped_query_settings, refuse_biases
from polyturn.trainer.megatron.families.family import Family, HFConfig
from polyturn.trainer.megatron.families.mapping import (
    ATTENTION,
    CORRECTED_ROUTER,
    DENSE_MLP,
    EMBEDDINGS,
    EXPERTS,
    SHARED_EXPERTS,
)


def expert_settings(hf: HFConfig) -> dict[str, Any]:
    """What all mixtures share: sizes, which layers have one, and no auxiliary loss."""
    return {
        "num_moe_experts": num_experts(hf),
        "moe_router_topk": hf["num_experts_per_tok"],
        "moe_ffn_hidden_size": hf["moe_intermediate_size"],
        "moe_layer_freq": [int(has_experts) for has_experts in expert_layers(hf)],
        # The policy gradient alone decides; an auxiliary loss would be another objective.
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        # Scores of near-equal experts differ by less than bfloat16 resolves.
        "moe_router_dtype": "fp32",
        # One module for all experts of a rank, whose parameters carry the names that Transformer Engine gives.
        "moe_grouped_gemm": True,
    }


def corrected_router_settings(hf: HFConfig) -> dict[str, Any]:
    """Sigmoid scores with a correction in the choice of experts, not in their weights (arXiv 2412.19437, 2.1.2).

    The correction stays what pre-training left: its update rate is 0.
    """
    settings: dict[str, Any] = {
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_bias_update_rate": 0.0,
        "moe_router_topk_scaling_factor": hf["routed_scaling_factor"],
    }
    if (hf.get("n_group") or 1) > 1:
        settings["moe_router_num_groups"] = hf["n_group"]
        settings["moe_router_group_topk"] = hf["topk_group"]
    if hf.get("n_shared_experts"):
        settings["moe_shared_expert_intermediate_size"] = hf["moe_intermediate_size"] * hf["n_shared_experts"]
    return settings


def refuse_choices(hf: HFConfig) -> None:
    """
    Raises:
        ValueError: more experts a token than there are, or none.
    """
    chosen, count = hf["num_experts_per_tok"], num_experts(hf)
    if not 0 < chosen <= count:
        raise ValueError(
            f"num_experts_per_tok={chosen} must be one of the {count} experts at least, and all at most"
        )


def refuse_routers(hf: HFConfig) -> None:
    """What Megatron-core's sigmoid router computes otherwise than the model's own.

    Raises:
        ValueError: weights that are not normed, or groups not chosen by their two best experts.
    """
    refuse_choices(hf)
    if hf.get("norm_topk_prob", True) != (hf["num_experts_per_tok"] > 1):
        raise ValueError(
            "sigmoid routing without norm_topk_prob is not supported, and with it not for one expert a token: weights "
            "are normed where several are chosen, and only there"
        )
    if hf.get("scoring_func", "sigmoid") != "sigmoid":
        raise ValueError(
            f"scoring_func {hf['scoring_func']!r} is not supported: only 'sigmoid' with this family"
        )
    if hf.get("topk_method", "noaux_tc") != "noaux_tc":
        raise ValueError(f"topk_method {hf['topk_method']!r} is not supported: only 'noaux_tc'")
    num_groups = hf.get("n_group") or 1
    if num_groups == 1:
        return
    if num_experts(hf) % num_groups or not 0 < hf["topk_group"] <= num_groups:
        raise ValueError(
            f"n_group={num_groups} must divide the {num_experts(hf)} experts, and topk_group={hf['topk_group']} be one "
            "of them at least and all at most"
        )
    if hf["num_experts_per_tok"] // hf["topk_group"] != 2:
        raise ValueError(
            "groups of experts are chosen by their two best: num_experts_per_tok must be twice topk_group, "
            f"not {hf['num_experts_per_tok']} with topk_group {hf['topk_group']}"
        )


def _qwen3_moe_settings(hf: HFConfig) -> dict[str, Any]:
    return {
        **grouped_query_settings(hf),
        **expert_settings(hf),
        "qk_layernorm": True,
        # Normed weights are the softmax over the chosen experts alone.
        "moe_router_pre_softmax": not hf.get("norm_topk_prob", False),
    }


_MIXTURE = {**EMBEDDINGS, **ATTENTION, **DENSE_MLP, **EXPERTS}


def _refuse_qwen3_moe(hf: HFConfig) -> None:
    refuse_biases(hf)
    refuse_choices(hf)
    if hf["num_experts_per_tok"] == 1 and hf.get("norm_topk_prob"):
        raise ValueError(
            "norm_topk_prob with one expert a token, whose weight is then always 1, is not supported"
        )


QWEN3_MOE = Family(
    model_types=("qwen3_moe",),
    settings=_qwen3_moe_settings,
    rows=_MIXTURE,
    refuse=_refuse_qwen3_moe,
    required=("num_experts_per_tok",),
)


def _glm4_moe_settings(hf: HFConfig) -> dict[str, Any]:
    return {
        **grouped_query_settings(hf),
        **expert_settings(hf),
        **corrected_router_settings(hf),
        "qk_layernorm": bool(hf.get("use_qk_norm")),
        "add_qkv_bias": bool(hf.get("attention_bias")),
    }


GLM4_MOE = Family(
    model_types=("glm4_moe",),
    settings=_glm4_moe_settings,
    rows={**_MIXTURE, **CORRECTED_ROUTER, **SHARED_EXPERTS},
    refuse=refuse_routers,
    required=("n_routed_experts", "num_experts_per_tok", "routed_scaling_factor"),
    rotary_percent=0.5,
)
"""arXiv 2508.06471"""
