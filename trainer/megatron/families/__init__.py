"""The model families that the trainer knows, by the `model_type` of their Hugging Face config."""

from __future__ import annotations

from polyturn.configs.sizing.model_shape import ModelShape
from polyturn.trainer.megatron.families.dense import GLM4, LLAMA, QWEN2, QWEN3
from polyturn.trainer.megatron.families.experts import GLM4_MOE, QWEN3_MOE
from polyturn.trainer.megatron.families.family import Family, HFConfig
from polyturn.trainer.megatron.families.keys import WHERE, check_keys
from polyturn.trainer.megatron.families.latent import LATENT
from polyturn.trainer.megatron.families.rope import YarnScaling, read_rope

FAMILIES: dict[str, Family] = {
    model_type: family
    for family in (LLAMA, QWEN2, QWEN3, QWEN3_MOE, GLM4, GLM4_MOE, LATENT)
    for model_type in family.model_types
}


def find_family(hf: HFConfig) -> Family:
    """The family of a Hugging Face config.

    Raises:
        ValueError: it is none of those known, or uses a feature of its family that is not supported.
    """
    model_type = hf.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(f"model_type {model_type!r} is not supported: one of {', '.join(sorted(FAMILIES))}")
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
    if hf.get("quantization_config"):
        raise ValueError(
            "the model's config.json has a quantization_config, and the trainer needs weights that are not quantised: "
            "use the model in bfloat16, or make it with polyturn convert DIR NEW --to hf, which reads block-wise FP8"
        )
    rope = read_rope(hf, default_percent=family.rotary_percent)
    if isinstance(rope.scaling, YarnScaling) and shape.latent is None:
        raise ValueError(
            "rope type 'yarn' is supported with latent attention only: use a model with 'default'"
        )
    rotated = shape.latent.rotary_dim if shape.latent else int(shape.head_dim * rope.percent)
    if rotated % 2 or not rotated:
        raise ValueError(
            f"{rotated} rotated dimensions of a head are not supported: they are rotated in pairs"
        )
    family.refuse(hf)
    return family


__all__ = ["FAMILIES", "Family", "HFConfig", "find_family"]
