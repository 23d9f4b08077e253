"""A Megatron-core GPT model from a Hugging Face config.

Import only after `install_cpu_compatibility`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.multi_latent_attention import MultiLatentAttention
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from torch.nn import functional

from polyturn.configs.sizing.memory import split_widths
from polyturn.configs.sizing.model_shape import ModelShape, StageSizes, divide_layers, num_experts
from polyturn.trainer.megatron.families import Family, find_family
from polyturn.trainer.megatron.families.family import core_settings
from polyturn.trainer.megatron.families.rope import Llama3Scaling, Rope, read_rope
from polyturn.trainer.megatron.layer_specs import block_spec
from polyturn.trainer.megatron.layout import ModelLayout

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """What a model is made of beside its TransformerConfig."""

    family: Family
    vocab_size: int
    padded_vocab_size: int
    """A multiple of the tensor-parallel size."""
    tied_embeddings: bool
    shape: ModelShape
    max_position_embeddings: int
    rope: Rope


def read_architecture(hf: Mapping[str, Any], *, tensor_parallel: int) -> Architecture:
    """Family, vocabulary, embeddings and positions of a Hugging Face config.

    Raises:
        ValueError: a family or a feature that is not supported.
    """
    family = find_family(hf)
    shape = ModelShape.of(hf, source="the model's config.json")
    rope = read_rope(hf, default_percent=family.rotary_percent)
    vocab_size = hf["vocab_size"]
    return Architecture(
        family=family,
        vocab_size=vocab_size,
        padded_vocab_size=math.ceil(vocab_size / tensor_parallel) * tensor_parallel,
        tied_embeddings=bool(hf.get("tie_word_embeddings", False)),
        shape=shape,
        max_position_embeddings=hf["max_position_embeddings"],
        rope=rope,
    )


def transformer_config(
    hf: Mapping[str, Any],
    *,
    dtype: str,
    device: str,
    extra: Mapping[str, Any],
    layout: ModelLayout | None = None,
) -> TransformerConfig:
    """Megatron-core's config of a Hugging Face one; `extra` holds the user's further fields, which win.

    Args:
        layout: None takes that of the groups that are up.

    Raises:
        ValueError: a model family or feature that is not supported, or does not go with the layout.
    """
    family = find_family(hf)
    layout = layout or ModelLayout.current()
    _refuse_layout(hf, layout)
    torch_dtype = DTYPES[dtype]
    settings: dict[str, Any] = {
        **core_settings(hf),
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": functional.silu,
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        **family.settings(hf),
        **_layout_settings(layout),
        "params_dtype": torch_dtype,
        "pipeline_dtype": torch_dtype,
        "bf16": dtype == "bfloat16",
        # Gradients are sums over tokens: nothing upstream divides by micro-batches or ranks.
        "calculate_per_token_loss": True,
        "use_cpu_initialization": device == "cpu",
        # Every weight is loaded.
        "perform_initialization": False,
        "gradient_accumulation_fusion": False,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "persist_layer_norm": False,
        "apply_rope_fusion": False,
        "tp_comm_overlap": False,
        "batch_p2p_comm": False,
        # The only dispatcher that takes packs of differing lengths; upstream asks for it in dense models, too.
        "moe_token_dispatcher_type": "alltoall",
        "variable_seq_lengths": True,
    }
    settings |= extra
    settings |= _stage_settings(settings, layout)
    config_class = MLATransformerConfig if settings.get("multi_latent_attention") else TransformerConfig
    try:
        return config_class(**settings)
    except (AssertionError, TypeError, ValueError) as error:
        raise ValueError(
            f"Megatron-core refuses the model, the layout or an option of it: {error}"
        ) from error


def _layout_settings(layout: ModelLayout) -> dict[str, Any]:
    return {
        "tensor_model_parallel_size": layout.tensor,
        "sequence_parallel": layout.tensor > 1,
        "pipeline_model_parallel_size": layout.pipeline,
        "virtual_pipeline_model_parallel_size": layout.virtual_pipeline,
        # Interleaved stages send while they compute; upstream's other schedule does not.
        "overlap_p2p_comm": layout.virtual_pipeline is not None,
        "context_parallel_size": layout.context,
        "expert_model_parallel_size": layout.expert,
        "expert_tensor_parallel_size": layout.expert_tensor,
    }


def _stage_settings(settings: Mapping[str, Any], layout: ModelLayout) -> dict[str, Any]:
    """Numbers of layers of the first and last stage, where the layers do not divide evenly."""
    stages = divide_layers(
        settings["num_layers"],
        layout.pipeline,
        layout.virtual_pipeline,
        given=StageSizes(
            first=settings.get("num_layers_in_first_pipeline_stage"),
            last=settings.get("num_layers_in_last_pipeline_stage"),
        ),
    )
    return {
        "num_layers_in_first_pipeline_stage": stages.first,
        "num_layers_in_last_pipeline_stage": stages.last,
    }


def _refuse_layout(hf: Mapping[str, Any], layout: ModelLayout) -> None:
    groups = hf.get("num_key_value_heads") or hf["num_attention_heads"]
    if groups % layout.tensor:
        raise ValueError(
            f"parallel.tensor={layout.tensor} must divide the model's {groups} key-value heads: use a smaller one"
        )
    experts = num_experts(hf)
    if layout.expert > 1 and not experts:
        raise ValueError(f"parallel.expert={layout.expert} asks for experts, and the model has none: use 1")
    if experts % layout.expert:
        raise ValueError(f"parallel.expert={layout.expert} must divide the model's {experts} experts")
    for axis, width, what in split_widths(ModelShape.of(hf, source="the model's config.json")):
        if width % getattr(layout, axis):
            raise ValueError(
                f"parallel.{axis}={getattr(layout, axis)} must divide the {width} channels of the model's {what}"
            )


def build_model(
    config: TransformerConfig, architecture: Architecture, *, device: str, vp_stage: int | None = None
) -> GPTModel:
    """This rank's pipeline stage, its weights not yet loaded. The process group and Megatron's groups must be up.

    Args:
        vp_stage: which of the rank's virtual stages, where there are any.
    """
    rope = architecture.rope
    model = GPTModel(
        config,
        block_spec(
            config,
            sandwich_norms=architecture.family.sandwich_norms,
            device=device,
            vp_stage=vp_stage,
            pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        ),
        vocab_size=architecture.padded_vocab_size,
        max_sequence_length=architecture.max_position_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(
            ignore_virtual=vp_stage is None, vp_stage=vp_stage
        ),
        post_process=parallel_state.is_pipeline_last_stage(
            ignore_virtual=vp_stage is None, vp_stage=vp_stage
        ),
        parallel_output=True,
        share_embeddings_and_output_weights=architecture.tied_embeddings,
        position_embedding_type="rope",
        rotary_percent=rope.percent,
        rotary_base=rope.base,
        vp_stage=vp_stage,
    )
    if isinstance(rope.scaling, Llama3Scaling):
        model.rotary_pos_emb.inv_freq = rope.scaling.apply(model.rotary_pos_emb.inv_freq)
    if architecture.family.latent_norm_epsilon is not None:
        _set_latent_epsilon(model, architecture.family.latent_norm_epsilon)
    return model.cuda() if device == "cuda" else model


def build_chunks(config: TransformerConfig, architecture: Architecture, *, device: str) -> list[GPTModel]:
    """This rank's part of the model: one chunk for each of its virtual pipeline stages, or a single one."""
    num_chunks = config.virtual_pipeline_model_parallel_size
    stages = [None] if num_chunks is None else range(num_chunks)
    return [build_model(config, architecture, device=device, vp_stage=stage) for stage in stages]


def _set_latent_epsilon(model: GPTModel, epsilon: float) -> None:
    for module in model.modules():
        if isinstance(module, MultiLatentAttention):
            module.linear_kv_up_proj.eps = epsilon
            if module.config.q_lora_rank is not None:
                module.linear_q_up_proj.eps = epsilon
