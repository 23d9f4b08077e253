"""Which options of Megatron-core the `megatron:` section may not set, and why.

Its keys are fields of Megatron-core's TransformerConfig; those under `megatron.ddp` and `megatron.optimizer` are fields
of its DistributedDataParallelConfig and OptimizerConfig.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_TRAINER_LAYOUT = "the trainer's layout is trainer.parallel"
_FROM_MODEL = "it comes from the model's config.json"
_OWN_LOGPROBS = "the trainer computes logprobs itself, without all logits at once"
_NO_PREDICTION = "only the next token is trained on"
_CALLBACK = "it is a function, which the trainer sets"
_NO_FSDP = "weights are read whole after every update, which Megatron's FSDP does not keep"
_NO_FLOAT16 = "model.dtype is float32 or bfloat16, which need no loss scale"
_SCHEDULE = "set trainer.optimizer.learning_rate and trainer.optimizer.schedule"

OWNED_TRANSFORMER: Mapping[str, str] = {
    "tensor_model_parallel_size": "set trainer.parallel.tensor",
    "sequence_parallel": "it follows trainer.parallel.tensor",
    **dict.fromkeys(
        (
            "pipeline_model_parallel_size",
            "virtual_pipeline_model_parallel_size",
            "context_parallel_size",
            "expert_model_parallel_size",
            "expert_tensor_parallel_size",
        ),
        _TRAINER_LAYOUT,
    ),
    **dict.fromkeys(("params_dtype", "pipeline_dtype", "autocast_dtype", "bf16", "fp16"), "set model.dtype"),
    **dict.fromkeys(
        (
            "num_layers",
            "hidden_size",
            "ffn_hidden_size",
            "num_attention_heads",
            "num_query_groups",
            "kv_channels",
            "normalization",
            "layernorm_epsilon",
            "qk_layernorm",
            "add_qkv_bias",
            "add_bias_linear",
            "gated_linear_unit",
            "activation_func",
            "rotary_interleaved",
            "multi_latent_attention",
            "num_moe_experts",
            "moe_layer_freq",
            "moe_ffn_hidden_size",
            "moe_shared_expert_intermediate_size",
            "moe_router_topk",
            "moe_router_score_function",
            "moe_router_pre_softmax",
            "moe_router_num_groups",
            "moe_router_group_topk",
            "moe_router_topk_scaling_factor",
            "moe_router_enable_expert_bias",
        ),
        _FROM_MODEL,
    ),
    **dict.fromkeys(
        (
            "pipeline_model_parallel_layout",
            "account_for_embedding_in_pipeline_split",
            "account_for_loss_in_pipeline_split",
        ),
        "stages are sized by num_layers_in_first_pipeline_stage and num_layers_in_last_pipeline_stage",
    ),
    **dict.fromkeys(
        ("hidden_dropout", "attention_dropout"),
        "dropout would make the trainer's logprobs differ from the engine's",
    ),
    **dict.fromkeys(
        ("cross_entropy_loss_fusion", "cross_entropy_fusion_impl", "defer_embedding_wgrad_compute"),
        _OWN_LOGPROBS,
    ),
    **dict.fromkeys(("mtp_num_layers", "mtp_loss_scaling_factor"), _NO_PREDICTION),
    **dict.fromkeys(
        (
            "finalize_model_grads_func",
            "grad_scale_func",
            "no_sync_func",
            "grad_sync_func",
            "param_sync_func",
            "timers",
        ),
        _CALLBACK,
    ),
    "calculate_per_token_loss": "losses are sums that the trainer divides by global counts",
    "use_cpu_initialization": "set trainer.device",
    "perform_initialization": "every weight is loaded from model.path",
    "variable_seq_lengths": "micro-batches are packed to differing lengths",
    "moe_grouped_gemm": "the experts' layers follow trainer.device",
}

OWNED_DDP: Mapping[str, str] = {
    "use_distributed_optimizer": "checkpoints hold the distributed optimizer's shares",
    "average_in_collective": "losses are sums that the trainer divides by global counts",
    "overlap_param_gather": "weights are read right after an update, so there is nothing to hide the gather behind",
    "align_param_gather": "the gather of weights is not overlapped",
    **dict.fromkeys(
        (
            "use_megatron_fsdp",
            "use_custom_fsdp",
            "data_parallel_sharding_strategy",
            "outer_dp_sharding_strategy",
            "suggested_communication_unit_size",
            "preserve_fp32_weights",
            "keep_fp8_transpose_cache",
            "fsdp_double_buffer",
            "fsdp_manual_registration",
        ),
        _NO_FSDP,
    ),
}

OWNED_OPTIMIZER: Mapping[str, str] = {
    "optimizer": "AdamW is what checkpoints and resuming are made for",
    **dict.fromkeys(("lr", "min_lr", "decoupled_lr", "decoupled_min_lr"), _SCHEDULE),
    "weight_decay": "set trainer.optimizer.weight_decay",
    "adam_beta1": "set trainer.optimizer.beta1",
    "adam_beta2": "set trainer.optimizer.beta2",
    "adam_eps": "set trainer.optimizer.epsilon",
    "clip_grad": "set trainer.optimizer.clip_grad",
    "decoupled_weight_decay": "weight decay is AdamW's",
    **dict.fromkeys(("params_dtype", "bf16", "fp16"), "set model.dtype"),
    **dict.fromkeys(
        ("loss_scale", "initial_loss_scale", "min_loss_scale", "loss_scale_window", "hysteresis"),
        _NO_FLOAT16,
    ),
    "use_distributed_optimizer": "it always is",
    "overlap_param_gather": OWNED_DDP["overlap_param_gather"],
    "overlap_param_gather_with_optimizer_step": OWNED_DDP["overlap_param_gather"],
    "timers": _CALLBACK,
    "sgd_momentum": "the optimizer is AdamW",
}


@dataclass(frozen=True, slots=True)
class Group:
    """One of Megatron-core's config classes, as the section holds it."""

    prefix: str
    """Before its keys: empty, or `ddp.`."""
    class_name: str
    owned: Mapping[str, str]
    needs_gpu: Mapping[str, str]
    """Options that a CPU rank has no use for or cannot run, by reason; refused there unless switched off."""


_DEEPEP = "DeepEP sends tokens between GPUs"
_TRANSFORMER_ENGINE = "it is one of Transformer Engine's or Apex's GPU kernels"
_GRAPHS = "there are no CUDA graphs on a CPU"

TRANSFORMER = Group(
    "",
    "TransformerConfig",
    OWNED_TRANSFORMER,
    {
        "moe_enable_deepep": _DEEPEP,
        **dict.fromkeys(
            (
                "fp8",
                "fp4",
                "tp_comm_overlap",
                "gradient_accumulation_fusion",
                "masked_softmax_fusion",
                "persist_layer_norm",
                "apply_rope_fusion",
                "bias_activation_fusion",
                "bias_dropout_fusion",
                "moe_permute_fusion",
                "moe_router_fusion",
                "use_te_rng_tracker",
                "use_te_activation_func",
            ),
            _TRANSFORMER_ENGINE,
        ),
        **dict.fromkeys(
            ("cpu_offloading", "fine_grained_activation_offloading"),
            "there is no GPU whose memory it would spare",
        ),
        **dict.fromkeys(("enable_cuda_graph", "external_cuda_graph", "cuda_graph_impl"), _GRAPHS),
        "batch_p2p_comm": "gloo does not batch sends",
    },
)
DDP = Group(
    "ddp.",
    "DistributedDataParallelConfig",
    OWNED_DDP,
    {
        "nccl_ub": "its buffers are NCCL's",
        "fp8_param_gather": _TRANSFORMER_ENGINE,
        "reuse_grad_buf_for_mxfp8_param_ag": _TRANSFORMER_ENGINE,
    },
)
OPTIMIZER = Group(
    "optimizer.",
    "OptimizerConfig",
    OWNED_OPTIMIZER,
    {
        "optimizer_cpu_offload": "there is no GPU whose memory it would spare",
        "use_precision_aware_optimizer": "its lower precisions are Transformer Engine's FusedAdam's",
        "fp8_recipe": _TRANSFORMER_ENGINE,
        "reuse_grad_buf_for_mxfp8_param_ag": _TRANSFORMER_ENGINE,
    },
)
GROUPS = (TRANSFORMER, DDP, OPTIMIZER)

DTYPES: Mapping[str, tuple[str, ...]] = {
    "optimizer.main_grads_dtype": ("float32", "bfloat16"),
    "optimizer.main_params_dtype": ("float32", "float16"),
    "optimizer.exp_avg_dtype": ("float32", "float16", "bfloat16", "uint8"),
    "optimizer.exp_avg_sq_dtype": ("float32", "float16", "bfloat16", "uint8"),
}
"""Options that are a type of numbers, by what Transformer Engine's FusedAdam takes; uint8 holds FP8."""


def refuse_value(key: str, value: Any, *, device: str) -> str | None:
    """Why a run could not use this value of a known option; None if it could."""
    if key == "moe_token_dispatcher_type":
        if value == "allgather":
            return "the allgather dispatcher wants micro-batches of one length; leave 'alltoall', or use 'flex' on GPUs"
        if value == "flex" and device == "cpu":
            return f"{_DEEPEP}; leave 'alltoall'"
    if key in DTYPES and value not in DTYPES[key]:
        return f"it must be one of {', '.join(DTYPES[key])}"
    for group in GROUPS:
        name = key.removeprefix(group.prefix)
        own = key.startswith(group.prefix) and (group.prefix or "." not in key)
        if own and device == "cpu" and name in group.needs_gpu and value not in (False, None, "none"):
            return f"{group.needs_gpu[name]}, and trainer.device is cpu"
    return None
