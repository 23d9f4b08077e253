"""A Megatron-core GPT model from a Hugging Face config.

Import only after `install_cpu_compatibility`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import HAVE_TE, get_gpt_decoder_block_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn import functional

from polyturn.trainer.megatron.torch_layers import torch_block_spec

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """How the models of one `model_type` differ from Llama."""

    qk_layernorm: bool = False
    qkv_bias: bool = False


FAMILIES = {
    "llama": Family(),
    "qwen2": Family(qkv_bias=True),
    "qwen3": Family(qk_layernorm=True),
}

OWNED_FIELDS = (
    "tensor_model_parallel_size",
    "sequence_parallel",
    "params_dtype",
    "bf16",
    "calculate_per_token_loss",
    "finalize_model_grads_func",
)
"""Fields of TransformerConfig that the user's `megatron:` section may not set."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """What `GPTModel` needs beside the TransformerConfig."""

    vocab_size: int
    padded_vocab_size: int
    """A multiple of the tensor-parallel size."""
    tied_embeddings: bool
    max_position_embeddings: int
    rotary_base: float
    rotary_percent: float
    rope_scaling_factor: float | None


def read_architecture(hf: Mapping[str, Any], *, tensor_parallel: int) -> Architecture:
    """Vocabulary, embeddings and positions of a Hugging Face config.

    Raises:
        ValueError: a feature that is not supported.
    """
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in ("default", "llama3"):
        raise ValueError(f"rope type {rope_type!r} is not supported: use a model with 'default' or 'llama3'")
    if rope_type == "llama3":
        numbers = (
            rope["low_freq_factor"],
            rope["high_freq_factor"],
            rope["original_max_position_embeddings"],
        )
        if numbers != (1.0, 4.0, 8192):
            raise ValueError(f"llama3 rope is supported with factors 1, 4 and 8192 positions, not {numbers}")
    vocab_size = hf["vocab_size"]
    return Architecture(
        vocab_size=vocab_size,
        padded_vocab_size=math.ceil(vocab_size / tensor_parallel) * tensor_parallel,
        tied_embeddings=bool(hf.get("tie_word_embeddings", False)),
        max_position_embeddings=hf["max_position_embeddings"],
        rotary_base=rope.get("rope_theta") or hf.get("rope_theta") or 10_000.0,
        rotary_percent=rope.get("partial_rotary_factor") or hf.get("partial_rotary_factor") or 1.0,
        rope_scaling_factor=float(rope["factor"]) if rope_type == "llama3" else None,
    )


def transformer_config(
    hf: Mapping[str, Any], *, dtype: str, device: str, tensor_parallel: int, extra: Mapping[str, Any]
) -> TransformerConfig:
    """Megatron-core's config of a Hugging Face one; `extra` holds the user's further fields, which win.

    Raises:
        ValueError: a model family or feature that is not supported, or a field that does not exist or is not the
            user's to set.
    """
    model_type = hf.get("model_type")
    if model_type not in FAMILIES:
        raise ValueError(f"model_type {model_type!r} is not supported: one of {', '.join(sorted(FAMILIES))}")
    family = FAMILIES[model_type]
    _refuse_unsupported(hf, family, tensor_parallel=tensor_parallel)
    _refuse_fields(extra)
    torch_dtype = DTYPES[dtype]
    settings: dict[str, Any] = {
        "num_layers": hf["num_hidden_layers"],
        "hidden_size": hf["hidden_size"],
        "num_attention_heads": hf["num_attention_heads"],
        "num_query_groups": hf.get("num_key_value_heads") or hf["num_attention_heads"],
        "kv_channels": hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"],
        "ffn_hidden_size": hf["intermediate_size"],
        "layernorm_epsilon": hf["rms_norm_eps"],
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": functional.silu,
        "add_bias_linear": False,
        "add_qkv_bias": family.qkv_bias,
        "qk_layernorm": family.qk_layernorm,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "tensor_model_parallel_size": tensor_parallel,
        "sequence_parallel": tensor_parallel > 1,
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
        "moe_token_dispatcher_type": "alltoall",
        "variable_seq_lengths": True,
    }
    return TransformerConfig(**{**settings, **extra})


def _refuse_unsupported(hf: Mapping[str, Any], family: Family, *, tensor_parallel: int) -> None:
    if hf.get("hidden_act", "silu") != "silu":
        raise ValueError(f"hidden_act {hf['hidden_act']!r} is not supported: only 'silu'")
    if hf.get("use_sliding_window"):
        raise ValueError("sliding-window attention is not supported")
    if hf.get("mlp_bias") or (hf.get("attention_bias") and not family.qkv_bias):
        raise ValueError("biases in the attention output or the MLP are not supported")
    groups = hf.get("num_key_value_heads") or hf["num_attention_heads"]
    if groups % tensor_parallel:
        raise ValueError(
            f"parallel.tensor={tensor_parallel} must divide the model's {groups} key-value heads: use a smaller one"
        )


def _refuse_fields(extra: Mapping[str, Any]) -> None:
    known = {field.name for field in fields(TransformerConfig)}
    for name in extra:
        if name in OWNED_FIELDS:
            raise ValueError(f"megatron.{name} is set by polyturn from the rest of the config")
        if name not in known:
            raise ValueError(f"megatron.{name} is no field of megatron-core's TransformerConfig")


def build_model(config: TransformerConfig, architecture: Architecture, *, device: str) -> GPTModel:
    """The model of this rank, its weights not yet loaded. `torch.distributed` and Megatron's groups must be up."""
    if HAVE_TE and device == "cuda":
        spec = get_gpt_decoder_block_spec(config, use_transformer_engine=True, normalization="RMSNorm")
    else:
        spec = torch_block_spec(config)
    model = GPTModel(
        config,
        spec,
        vocab_size=architecture.padded_vocab_size,
        max_sequence_length=architecture.max_position_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        parallel_output=True,
        share_embeddings_and_output_weights=architecture.tied_embeddings,
        position_embedding_type="rope",
        rotary_percent=architecture.rotary_percent,
        rotary_base=architecture.rotary_base,
        rope_scaling=architecture.rope_scaling_factor is not None,
        rope_scaling_factor=architecture.rope_scaling_factor or 8.0,
    )
    return model.cuda() if device == "cuda" else model


class LogitRows:
    """Makes a model compute logits only at chosen positions of a pack.

    Most tokens of a multi-turn episode are observations, whose logits nobody reads; with a large vocabulary they would
    be the largest tensors of all. Set `rows` (positions in the whole pack, [N]) before each forward pass.
    """

    def __init__(self, model: GPTModel) -> None:
        self.rows: torch.Tensor | None = None
        self._gathers = bool(model.config.sequence_parallel)
        layer = model.output_layer
        if self._gathers:
            # The rows are chosen from the gathered sequence, so the layer must sum its input's gradient itself.
            layer.sequence_parallel = False
            layer.allreduce_dgrad = True
        layer.register_forward_pre_hook(self._choose)

    def _choose(self, _layer: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        assert self.rows is not None, "the rows of this pack were not set"
        hidden, *rest = inputs
        if self._gathers:
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
        return hidden.index_select(0, self.rows), *rest
