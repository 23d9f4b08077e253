"""Model families: what Megatron-core has to be told so that it computes what a Hugging Face config describes.

A family is settings for Megatron-core, the rows by which its weights are converted (`weight_mapping`), and what it
refuses. Everything that reads a config.json goes through `find_family` first, so a key that is missing, mistyped or
not supported is one sentence, wherever a model comes from; sizes are checked with the rest of a model's shape
(`ModelShape`). Two configs describe the same computation where they give Megatron-core the same settings: what only
training reads (dropout, losses of routers, initial weights), limits, token ids and the spelling of rotary embeddings
make no difference.

Nothing here needs torch. The module is long as a table is: one family after the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from polyturn.configs.sizing.model_shape import ModelShape, expert_layers, num_experts
from polyturn.trainer.models.config_keys import explain_lacking, refuse_unread
from polyturn.trainer.models.quantization import BlockFP8
from polyturn.trainer.models.rope import Rope, YarnScaling, read_rope
from polyturn.trainer.models.weight_mapping import (
    ATTENTION,
    CORRECTED_ROUTER,
    DENSE_MLP,
    EMBEDDINGS,
    EXPERTS,
    LATENT_ATTENTION,
    SHARED_EXPERTS,
    Mapped,
    Rows,
)

HFConfig = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """The models of one or more `model_type`s."""

    model_types: tuple[str, ...]
    settings: Callable[[HFConfig], dict[str, Any]]
    """Fields of Megatron-core's TransformerConfig, beyond those that all families share."""
    rows: Rows
    refuse: Callable[[HFConfig], None] = lambda _hf: None
    """Raises ValueError for a feature of the family that is not supported."""
    required: tuple[str, ...] = ()
    """Keys that a config must have, beyond those of every family: where they are missing, transformers has defaults of
    its own."""
    reads: tuple[str, ...] = ()
    """Of `config_keys.FEATURES`, what the family computes, or refuses itself."""
    rotary_base: float = 10_000.0
    """Where the config names none."""
    rotary_percent: float = 1.0
    """The share of a head's dimensions that is rotated, where the config does not say; where it is 1, all are, whatever
    the config says."""
    sandwich_norms: bool = False
    """The outputs of attention and MLP are normed before they are added, too."""
    latent_norm_epsilon: float | None = None
    """Of the norms inside latent attention, where it is not that of the others."""

    def rope(self, hf: HFConfig) -> Rope:
        """Raises ValueError as `read_rope` does."""
        return read_rope(hf, default_percent=self.rotary_percent, default_base=self.rotary_base)


def core_settings(hf: HFConfig) -> dict[str, Any]:
    """Fields of Megatron-core's TransformerConfig that all families read alike."""
    return {
        "num_layers": hf["num_hidden_layers"],
        "hidden_size": hf["hidden_size"],
        "num_attention_heads": hf["num_attention_heads"],
        "layernorm_epsilon": hf["rms_norm_eps"],
    }


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
    reads=("sliding_window",),
)

QWEN3 = Family(
    model_types=("qwen3",),
    settings=lambda hf: {**grouped_query_settings(hf), "qk_layernorm": True},
    rows=_DENSE,
    refuse=refuse_biases,
    reads=("sliding_window",),
)


def _refuse_mistral(hf: HFConfig) -> None:
    refuse_biases(hf)
    if hf.get("sliding_window") is not None or "sliding_window" not in hf:
        raise ValueError(
            "sliding-window attention is not supported: sliding_window must be null in config.json (without the key "
            "transformers takes 4096)"
        )


MISTRAL = Family(
    model_types=("mistral",),
    settings=grouped_query_settings,
    rows=_DENSE,
    refuse=_refuse_mistral,
    reads=("sliding_window",),
)


def _refuse_seed_oss(hf: HFConfig) -> None:
    if hf.get("mlp_bias") or hf.get("attention_out_bias"):
        raise ValueError("biases in the attention output or the MLP are not supported")


SEED_OSS = Family(
    model_types=("seed_oss",),
    settings=lambda hf: {**grouped_query_settings(hf), "add_qkv_bias": hf["attention_bias"]},
    rows=_DENSE,
    refuse=_refuse_seed_oss,
    required=("attention_bias", "head_dim"),
    reads=("attention_out_bias",),
)


def _refuse_ernie(hf: HFConfig) -> None:
    refuse_biases(hf)
    if hf.get("use_bias"):
        raise ValueError("use_bias is not supported: biases in the attention output or the MLP")


ERNIE = Family(
    model_types=("ernie4_5",),
    settings=lambda hf: {**grouped_query_settings(hf), "rotary_interleaved": True},
    rows=_DENSE,
    refuse=_refuse_ernie,
    required=("head_dim", "tie_word_embeddings"),
    reads=("use_bias",),
    rotary_base=500_000.0,
)


def _layers_without_positions(hf: HFConfig) -> list[int]:
    """1 for each layer whose queries and keys are not rotated, 0 for the others.

    Raises:
        ValueError: the config does not say it of each layer.
    """
    num_layers, rotates = hf["num_hidden_layers"], hf.get("no_rope_layers")
    if rotates is None:
        every = hf.get("no_rope_layer_interval", 4)
        if type(every) is not int or every < 1:
            raise ValueError(
                f"{WHERE}: 'no_rope_layer_interval' must be an integer above 0, not {every!r:.60}"
            )
        return [int((layer + 1) % every == 0) for layer in range(num_layers)]
    if (
        not isinstance(rotates, list)
        or len(rotates) != num_layers
        or any(type(one) not in (int, bool) or one not in (0, 1) for one in rotates)
    ):
        raise ValueError(
            f"{WHERE}: 'no_rope_layers' must be 1 (rotated) or 0 for each of the {num_layers} layers"
        )
    return [1 - int(one) for one in rotates]


def _refuse_smollm3(hf: HFConfig) -> None:
    refuse_biases(hf)
    _layers_without_positions(hf)


def _smollm3_settings(hf: HFConfig) -> dict[str, Any]:
    layers = _layers_without_positions(hf)
    return {**grouped_query_settings(hf), "no_rope_freq": layers if any(layers) else None}


SMOLLM3 = Family(
    model_types=("smollm3",),
    settings=_smollm3_settings,
    rows=_DENSE,
    refuse=_refuse_smollm3,
    required=("tie_word_embeddings",),
    reads=("no_rope_layers", "no_rope_layer_interval", "sliding_window"),
    rotary_base=2_000_000.0,
)
"""Layers without positions (arXiv 2501.18795)."""


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
    reads=("sliding_window",),
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
    reads=("use_qk_norm",),
    rotary_percent=0.5,
)
"""arXiv 2508.06471"""


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
    if isinstance(scaling, YarnScaling) and not (scaling.is_usual_factor and scaling.truncate):
        raise ValueError(
            "yarn rope with attention_factor or without truncation is not supported with latent attention"
        )


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


def _refuse_lite(hf: HFConfig) -> None:
    _refuse(hf)
    first_dense = hf.get("first_k_dense_replace")
    kinds = expert_layers(hf)
    if first_dense is not None and kinds != tuple(layer >= first_dense for layer in range(len(kinds))):
        raise ValueError(
            f"{WHERE} has first_k_dense_replace={first_dense}, and layers with experts are others: transformers goes "
            "by mlp_layer_types (without it, all but the first), engines by first_k_dense_replace"
        )


LATENT_LITE = replace(
    LATENT,
    model_types=("glm4_moe_lite",),
    refuse=_refuse_lite,
    reads=("mlp_layer_types",),
)
"""GLM-4.7-Flash: latent attention with GLM's experts."""


NUMBERS = ("rms_norm_eps", "routed_scaling_factor", "rope_theta", "partial_rotary_factor")
COUNTS = (
    "decoder_sparse_step",
    "first_k_dense_replace",
    "n_group",
    "n_routed_experts",
    "num_experts",
    "num_experts_per_tok",
    "num_local_experts",
    "topk_group",
)
FLAGS = (
    "attention_bias",
    "attention_out_bias",
    "is_causal",
    "mlp_bias",
    "norm_topk_prob",
    "rope_interleave",
    "tie_word_embeddings",
    "use_bias",
    "use_qk_norm",
    "use_sliding_window",
)
OBJECTS = ("rope_parameters", "rope_scaling")
WHERE = "the model's config.json"


def check_keys(hf: HFConfig, family: Family) -> None:
    """
    Raises:
        ValueError: a key that the family needs is missing, or one is not of its kind.
    """
    for key in ("rms_norm_eps", *family.required):
        if hf.get(key) is None:
            raise ValueError(f"{WHERE} has no '{key}', which model_type {hf['model_type']!r} needs")
    for keys, is_right, kind in (
        (NUMBERS, is_positive, "a number above 0"),
        (COUNTS, lambda value: type(value) is int and value >= 0, "an integer of at least 0"),
        (FLAGS, lambda value: isinstance(value, bool), "true or false"),
        (OBJECTS, lambda value: isinstance(value, Mapping), "an object"),
    ):
        for key in keys:
            value = hf.get(key)
            if value is not None and not is_right(value):
                raise ValueError(f"{WHERE}: '{key}' must be {kind}, not {value!r:.60}")


def is_positive(value: Any) -> bool:
    """Whether a value of JSON is a finite number above 0."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


FAMILIES: dict[str, Family] = {
    model_type: family
    for family in (
        LLAMA,
        MISTRAL,
        QWEN2,
        QWEN3,
        QWEN3_MOE,
        SEED_OSS,
        SMOLLM3,
        ERNIE,
        GLM4,
        GLM4_MOE,
        LATENT,
        LATENT_LITE,
    )
    for model_type in family.model_types
}


def find_family(hf: HFConfig) -> Family:
    """The family of a Hugging Face config.

    Raises:
        ValueError: it is none of those known, or uses a feature of its family that is not supported.
    """
    model_type = hf.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        lacking = explain_lacking(model_type) if isinstance(model_type, str) else ""
        raise ValueError(
            f"model_type {model_type!r} is not supported{lacking}: one of {', '.join(sorted(FAMILIES))}"
        )
    family = FAMILIES[model_type]
    check_keys(hf, family)
    shape = ModelShape.of(hf, source=WHERE)
    if hf.get("is_causal") is False:
        raise ValueError("is_causal=false is not supported: a policy sees what is before a token alone")
    if hf.get("hidden_act", "silu") != "silu":
        raise ValueError(f"hidden_act {hf['hidden_act']!r} is not supported: only 'silu'")
    if hf.get("use_sliding_window"):
        raise ValueError("sliding-window attention is not supported")
    kinds = hf.get("layer_types")
    if kinds is not None and (not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds)):
        raise ValueError("layer_types: only 'full_attention' is supported, in every layer")
    BlockFP8.of(hf, source="the model")
    refuse_unread(hf, reads=family.reads, source=WHERE)
    rope = family.rope(hf)
    rotated = shape.latent.rotary_dim if shape.latent else int(shape.head_dim * rope.percent)
    if rotated % 2 or not rotated:
        raise ValueError(
            f"{rotated} rotated dimensions of a head are not supported: they are rotated in pairs"
        )
    family.refuse(hf)
    return family


def describe_computation(hf: HFConfig) -> dict[str, Any]:
    """Setting -> value, of JSON's kinds.

    Raises:
        ValueError: a family or a feature that is not supported.
    """
    family = find_family(hf)
    rope = family.rope(hf)
    return {
        "family": family.model_types[0],
        "vocab_size": hf["vocab_size"],
        "tied_embeddings": bool(hf.get("tie_word_embeddings", False)),
        **core_settings(hf),
        **family.settings(hf),
        "rope_base": rope.base,
        "rope_percent": rope.percent,
        "rope_scaling": None if rope.scaling is None else asdict(rope.scaling),
    }


def same_computation(policy: Mapping[str, Any], other: Mapping[str, Any], *, source: Path, what: str) -> None:
    """Whether another model's config.json, that of `source`, describes the same computation as the policy's.

    Raises:
        ValueError: it does not; names the first setting that differs.
    """
    ours, theirs = describe_computation(policy), describe_computation(other)
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            raise ValueError(
                f"{what}: {source} has {name}={theirs.get(name)!r} by its config.json, the policy has "
                f"{ours.get(name)!r}; they must be models of one architecture"
            )
