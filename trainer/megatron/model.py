"""A Megatron-core GPT model from a Hugging Face config and the `megatron:` section, and what an update of it costs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.multi_latent_attention import MultiLatentAttention
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from torch.nn import functional

from polyturn.configs.loading.megatron_options import DTYPES
from polyturn.configs.loading.upstream import find_problems
from polyturn.configs.sizing.memory import split_widths
from polyturn.configs.sizing.model_shape import ModelShape, StageSizes, divide_layers, num_experts
from polyturn.trainer.megatron.layers import block_spec
from polyturn.trainer.megatron.process_groups import ModelLayout
from polyturn.trainer.megatron.rotary import scale_rope
from polyturn.trainer.models.families import Family, core_settings, find_family
from polyturn.trainer.models.rope import Rope, YarnScaling

TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


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
    vocab_size = hf["vocab_size"]
    return Architecture(
        family=family,
        vocab_size=vocab_size,
        padded_vocab_size=math.ceil(vocab_size / tensor_parallel) * tensor_parallel,
        tied_embeddings=bool(hf.get("tie_word_embeddings", False)),
        shape=shape,
        max_position_embeddings=hf["max_position_embeddings"],
        rope=family.rope(hf),
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
    torch_dtype = TORCH_DTYPES[dtype]
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
    scaling = family.rope(hf).scaling
    is_sharpened = isinstance(scaling, YarnScaling) and scaling.attention_factor != 1
    if settings["apply_rope_fusion"] and is_sharpened and not settings.get("multi_latent_attention"):
        raise ValueError(
            "megatron.apply_rope_fusion does not go with the model's yarn rope: the fused kernel has no factor for it"
        )
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
    fault = ModelShape.of(hf, source="the model's config.json").explain_heads(layout.tensor)
    if fault is not None:
        raise ValueError(f"parallel.tensor={layout.tensor} {fault}")
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
    if architecture.shape.latent is None:
        scale_rope(model, rope)
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


@dataclass(frozen=True, kw_only=True, slots=True)
class MegatronOptions:
    """Further fields of Megatron-core's configs, which win over ours."""

    transformer: Mapping[str, Any]
    ddp: Mapping[str, Any]
    optimizer: Mapping[str, Any]

    @classmethod
    def of(cls, section: Mapping[str, Any], *, device: str) -> Self:
        """Take the section apart.

        Raises:
            ValueError: a field that does not exist, is not the user's to set, or does not go with the device.
        """
        for _, problem in find_problems("megatron", section, device=device):
            raise ValueError(problem)
        optimizer = {
            key: getattr(torch, value) if key in DTYPES else value
            for key, value in section.get("optimizer", {}).items()
        }
        return cls(
            transformer={
                key: AttnBackend[value] if key == "attention_backend" else value
                for key, value in section.items()
                if key not in ("ddp", "optimizer")
            },
            ddp=section.get("ddp", {}),
            optimizer=optimizer,
        )


FORWARD_AND_BACKWARD = 3
"""The backward pass has two products for each one of the forward pass. What is computed again is not counted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerFlops:
    """Of one update, in this rank's share of the layers; embeddings and output layer are not among them."""

    token: float
    """For each token: two for each weight that it meets, of experts those that it is sent to."""
    pair: float
    """For each pair of a token and one that it attends to."""


def layer_flops(chunks: Iterable[GPTModel]) -> LayerFlops:
    """Of the parts of a model that a rank holds."""
    token = pair = 0.0
    for chunk in chunks:
        config = chunk.config
        for name, param in chunk.decoder.named_parameters():
            if param.dim() > 1:
                token += 2.0 * param.numel() * (_active_share(config) if ".experts." in name else 1.0)
        pair += len(chunk.decoder.layers) * 2.0 * _attended_width(config)
    return LayerFlops(token=FORWARD_AND_BACKWARD * token, pair=FORWARD_AND_BACKWARD * pair)


def _active_share(config: TransformerConfig) -> float:
    """Of this rank's experts, how many for each of its own tokens: other ranks send theirs, and are sent its own."""
    assert config.num_moe_experts is not None
    return config.moe_router_topk * config.expert_model_parallel_size / config.num_moe_experts


def _attended_width(config: TransformerConfig) -> int:
    """Products for a pair: the width of keys and of values, of all heads of this rank."""
    heads = config.num_attention_heads // config.tensor_model_parallel_size
    if isinstance(config, MLATransformerConfig):
        return heads * (config.qk_head_dim + config.qk_pos_emb_head_dim + config.v_head_dim)
    assert config.kv_channels is not None
    return heads * 2 * config.kv_channels
