"""Which options of Megatron-core the `megatron:` section may set, and within which bounds.

Its keys are fields of Megatron-core's TransformerConfig; those under `megatron.ddp` and `megatron.optimizer` are fields
of its DistributedDataParallelConfig and OptimizerConfig.

Open is what decides memory, communication, speed, or a precision that it names. What changes the function that the
model computes, the objective or the update is not: the first is the model's config.json's, the others are options of
their own. A field that stands in neither list is refused until somebody has decided where it belongs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

_TRAINER_LAYOUT = "the trainer's layout is trainer.parallel"
_FROM_MODEL = "it changes what the model computes, which its config.json alone decides"
_OWN_LOGPROBS = "the trainer computes logprobs itself, without all logits at once"
_NO_PREDICTION = "only the next token is trained on"
_CALLBACK = "it is a function, which the trainer sets"
_NO_FSDP = "weights are read whole after every update, which Megatron's FSDP does not keep"
_NO_FLOAT16 = "model.dtype is float32 or bfloat16, which need no loss scale"
_SCHEDULE = "set trainer.optimizer.learning_rate and trainer.optimizer.schedule"
_OBJECTIVE = "it adds to the objective, which trainer.algorithm alone decides"
_DROPS = "it drops or moves tokens, which the engine does not"
_LOADED = "every weight is loaded from model.path"
_STORED = "weights are kept in model.dtype: checkpoints, exports and engines read them so"
_GRAPHS = "CUDA graphs replay one shape, and micro-batches are packed to differing lengths"
_INFERENCE = "the engines generate, not the trainer"
_NOT_READ = "nothing here reads it: attention, norms and layers are torch's or Transformer Engine's"
_USERBUFFERS = "its buffers are made for one length, and micro-batches are packed to differing ones"
_SCHEDULES = "the trainer's schedules run one micro-batch at a time"
_VIRTUAL = "it follows trainer.parallel.virtual_pipeline"
_ADAMW = "the optimizer is AdamW"
_RECORDS = "the run directory has the config, the metrics and the times"
_ANOTHER_MODEL = "it is of models that the trainer does not know"

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
            "hierarchical_context_parallel_sizes",
            "hybrid_context_parallel",
            "max_seqlen_per_dp_cp_rank",
            "moe_extended_tp",
        ),
        _TRAINER_LAYOUT,
    ),
    **dict.fromkeys(
        ("params_dtype", "pipeline_dtype", "autocast_dtype", "enable_autocast", "bf16", "fp16"),
        "set model.dtype",
    ),
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
            "layernorm_zero_centered_gamma",
            "apply_residual_connection_post_layernorm",
            "qk_layernorm",
            "qk_l2_norm",
            "qk_clip",
            "qk_clip_alpha",
            "qk_clip_threshold",
            "add_qkv_bias",
            "add_bias_linear",
            "gated_linear_unit",
            "glu_linear_offset",
            "activation_func",
            "activation_func_clamp_value",
            "attention_output_gate",
            "softmax_scale",
            "softmax_type",
            "window_size",
            "window_attn_skip_freq",
            "no_rope_freq",
            "rotary_interleaved",
            "mrope_section",
            "multi_latent_attention",
            "num_moe_experts",
            "moe_layer_freq",
            "moe_ffn_hidden_size",
            "moe_latent_size",
            "moe_shared_expert_intermediate_size",
            "moe_shared_expert_gate",
            "moe_apply_probs_on_input",
            "moe_router_topk",
            "moe_router_topk_limited_devices",
            "moe_router_score_function",
            "moe_router_pre_softmax",
            "moe_router_num_groups",
            "moe_router_group_topk",
            "moe_router_topk_scaling_factor",
            "moe_router_enable_expert_bias",
            "moe_router_bias_update_rate",
            "moe_router_force_load_balancing",
        ),
        _FROM_MODEL,
    ),
    **dict.fromkeys(
        (
            "experimental_attention_variant",
            "dsa_indexer_n_heads",
            "dsa_indexer_head_dim",
            "dsa_indexer_topk",
            "dsa_indexer_loss_coeff",
            "dsa_indexer_use_sparse_loss",
            "linear_attention_freq",
            "linear_conv_kernel_dim",
            "linear_key_head_dim",
            "linear_value_head_dim",
            "linear_num_key_heads",
            "linear_num_value_heads",
            "is_hybrid_model",
            "mamba_state_dim",
            "mamba_head_dim",
            "mamba_num_groups",
            "mamba_num_heads",
            "use_mamba_mem_eff_path",
            "heterogeneous_block_specs",
            "hetereogenous_dist_checkpoint",
        ),
        _ANOTHER_MODEL,
    ),
    **dict.fromkeys(
        (
            "moe_input_jitter_eps",
            "moe_token_dropping",
            "moe_expert_capacity_factor",
            "moe_pad_expert_input_to_capacity",
            "moe_token_drop_policy",
        ),
        _DROPS,
    ),
    **dict.fromkeys(
        ("moe_router_load_balancing_type", "moe_aux_loss_coeff", "moe_z_loss_coeff", "moe_per_layer_logging"),
        _OBJECTIVE,
    ),
    "moe_enable_routing_replay": "set engines.routing_replay",
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
        (
            "cross_entropy_loss_fusion",
            "cross_entropy_fusion_impl",
            "defer_embedding_wgrad_compute",
            "wgrad_deferral_limit",
        ),
        _OWN_LOGPROBS,
    ),
    **dict.fromkeys(("mtp_num_layers", "mtp_loss_scaling_factor", "mtp_standalone"), _NO_PREDICTION),
    **dict.fromkeys(
        (
            "finalize_model_grads_func",
            "grad_scale_func",
            "no_sync_func",
            "grad_sync_func",
            "param_sync_func",
            "timers",
            "fp8_quantizer_factory",
            "fp4_quantizer_factory",
        ),
        _CALLBACK,
    ),
    **dict.fromkeys(
        (
            "init_method",
            "output_layer_init_method",
            "init_method_std",
            "embedding_init_method",
            "embedding_init_method_std",
            "perform_initialization",
        ),
        _LOADED,
    ),
    "init_model_with_meta_device": _NO_FSDP,
    **dict.fromkeys(
        (
            "fp8_param",
            "fp4_param",
            "quant_recipe",
            "use_kitchen",
            "use_kitchen_attention",
            "kitchen_attention_backend",
        ),
        _STORED,
    ),
    "fp32_residual_connection": "the residual stream is of model.dtype, as in the engines",
    **dict.fromkeys(
        (
            "cuda_graph_impl",
            "cuda_graph_scope",
            "cuda_graph_use_single_mempool",
            "cuda_graph_retain_backward_graph",
            "cuda_graph_warmup_steps",
            "enable_cuda_graph",
            "external_cuda_graph",
            "use_te_rng_tracker",
        ),
        _GRAPHS,
    ),
    **dict.fromkeys(
        (
            "flash_decode",
            "inference_rng_tracker",
            "inference_sampling_seed",
            "inference_fuse_tp_communication",
            "use_inference_optimized_layers",
            "symmetric_ar_type",
            "mlp_chunks_for_prefill",
        ),
        _INFERENCE,
    ),
    **dict.fromkeys(
        (
            "apply_query_key_layer_scaling",
            "attention_softmax_in_fp32",
            "masked_softmax_fusion",
            "persist_layer_norm",
            "memory_efficient_layer_norm",
            "use_fused_weighted_squared_relu",
            "async_tensor_model_parallel_allreduce",
            "log_max_attention_logit",
            "test_mode",
        ),
        _NOT_READ,
    ),
    "fused_single_qkv_rope": "it is for sequences that are not packed",
    **dict.fromkeys(
        (
            "tp_comm_overlap",
            "tp_comm_bulk_wgrad",
            "tp_comm_bulk_dgrad",
            "tp_comm_overlap_ag",
            "tp_comm_overlap_rs",
            "tp_comm_overlap_rs_dgrad",
            "tp_comm_split_ag",
            "tp_comm_atomic_ag",
            "tp_comm_split_rs",
            "tp_comm_atomic_rs",
            "tp_comm_overlap_disable_qkv",
            "tp_comm_overlap_disable_fc1",
            "tp_comm_bootstrap_backend",
        ),
        _USERBUFFERS,
    ),
    **dict.fromkeys(
        (
            "overlap_moe_expert_parallel_comm",
            "delay_wgrad_compute",
            "ep_overlap_early_attn_memory_release",
            "num_microbatches_with_partial_activation_checkpoints",
        ),
        _SCHEDULES,
    ),
    **dict.fromkeys(
        ("overlap_p2p_comm", "overlap_p2p_comm_warmup_flush", "microbatch_group_size_per_vp_stage"), _VIRTUAL
    ),
    "use_ring_exchange_p2p": "published builds of torch have no ring exchange",
    **dict.fromkeys(("config_logger_dir", "barrier_with_L1_time"), _RECORDS),
    "calculate_per_token_loss": "losses are sums that the trainer divides by global counts",
    "use_cpu_initialization": "set trainer.device",
    "transformer_impl": "the layers follow trainer.device",
    "variable_seq_lengths": "micro-batches are packed to differing lengths",
    "moe_grouped_gemm": "the experts' layers follow trainer.device",
    "moe_use_legacy_grouped_gemm": "the experts' layers follow trainer.device",
}

OWNED_DDP: Mapping[str, str] = {
    "use_distributed_optimizer": "checkpoints hold the distributed optimizer's shares",
    "num_distributed_optimizer_instances": _TRAINER_LAYOUT,
    **dict.fromkeys(
        ("average_in_collective", "gradient_reduce_div_fusion"),
        "losses are sums that the trainer divides by global counts",
    ),
    "overlap_param_gather": "weights are read right after an update (by scores, the reference and the export), "
    "and would be read half gathered",
    "align_param_gather": "the gather of weights is not overlapped",
    "delay_wgrad_compute": _SCHEDULES,
    **dict.fromkeys(("fp8_param_gather", "reuse_grad_buf_for_mxfp8_param_ag"), _STORED),
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
    "apply_wd_to_qk_layernorm": "set trainer.optimizer.decay_vectors",
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
    **dict.fromkeys(
        (
            "sgd_momentum",
            "muon_momentum",
            "muon_split_qkv",
            "muon_use_nesterov",
            "muon_scale_mode",
            "muon_fp32_matmul_prec",
            "muon_num_ns_steps",
            "muon_tp_mode",
            "muon_extra_scale_factor",
        ),
        _ADAMW,
    ),
    **dict.fromkeys(("fp8_recipe", "reuse_grad_buf_for_mxfp8_param_ag"), _STORED),
    **dict.fromkeys(("log_num_zeros_in_grad", "config_logger_dir", "barrier_with_L1_time"), _RECORDS),
}

_DEEPEP = "DeepEP sends tokens between GPUs"
_TRANSFORMER_ENGINE = "it is one of Transformer Engine's or Apex's GPU kernels"
_OFFLOAD = "there is no GPU whose memory it would spare"
_FUSED_ADAM = "its lower precisions are Transformer Engine's FusedAdam's"


@dataclass(frozen=True, kw_only=True, slots=True)
class Open:
    """An option that the section may set."""

    least: float | None = None
    most: float | None = None
    """Bounds of a number, both included."""
    choices: tuple[Any, ...] = ()
    """All that it, or each item of a list, may be; empty: whatever its type allows."""
    gpu: str = ""
    """Why a CPU rank has no use for it or cannot run it, where it is refused unless it switches the option off."""


_SWITCH = Open()
_KERNEL = Open(gpu=_TRANSFORMER_ENGINE)
_STAGE = Open(least=1)

OPEN_TRANSFORMER: Mapping[str, Open] = {
    "num_layers_in_first_pipeline_stage": _STAGE,
    "num_layers_in_last_pipeline_stage": _STAGE,
    "pipeline_model_parallel_comm_backend": Open(choices=("nccl", "ucc"), gpu="it sends between GPUs"),
    "attention_backend": Open(
        choices=("auto", "flash", "fused", "unfused"), gpu="it chooses among Transformer Engine's kernels"
    ),
    "disable_bf16_reduced_precision_matmul": _SWITCH,
    "deterministic_mode": _SWITCH,
    "batch_invariant_mode": _KERNEL,
    "recompute_granularity": Open(choices=("full", "selective")),
    "recompute_method": Open(choices=("uniform", "block")),
    "recompute_num_layers": Open(least=1),
    "recompute_modules": Open(
        choices=("core_attn", "moe_act", "layernorm", "mla_up_proj", "mlp", "moe", "shared_experts")
    ),
    "distribute_saved_activations": _SWITCH,
    "moe_layer_recompute": _SWITCH,
    "clone_scatter_output_in_embedding": _SWITCH,
    "deallocate_pipeline_outputs": _SWITCH,
    "disable_parameter_transpose_cache": _KERNEL,
    **dict.fromkeys(
        (
            "fp8_wgrad",
            "fp8_dot_product_attention",
            "fp8_multi_head_attention",
            "tp_only_amax_red",
            "first_last_layers_bf16",
            "gradient_accumulation_fusion",
            "apply_rope_fusion",
            "bias_activation_fusion",
            "bias_dropout_fusion",
            "activation_func_fp8_input_store",
            "moe_permute_fusion",
            "moe_router_fusion",
            "moe_router_padding_for_quantization",
            "moe_router_padding_for_fp8",
            "use_te_activation_func",
        ),
        _KERNEL,
    ),
    "fp8": Open(choices=("e4m3", "hybrid"), gpu=_TRANSFORMER_ENGINE),
    "fp8_recipe": Open(choices=("delayed", "tensorwise", "mxfp8", "blockwise"), gpu=_TRANSFORMER_ENGINE),
    "fp8_amax_compute_algo": Open(choices=("most_recent", "max"), gpu=_TRANSFORMER_ENGINE),
    "fp8_margin": Open(least=0, gpu=_TRANSFORMER_ENGINE),
    "fp8_interval": Open(least=1, gpu=_TRANSFORMER_ENGINE),
    "fp8_amax_history_len": Open(least=1, gpu=_TRANSFORMER_ENGINE),
    "num_layers_at_start_in_bf16": Open(least=0, gpu=_TRANSFORMER_ENGINE),
    "num_layers_at_end_in_bf16": Open(least=0, gpu=_TRANSFORMER_ENGINE),
    "fp4": Open(choices=("e2m1",), gpu=_TRANSFORMER_ENGINE),
    "fp4_recipe": Open(choices=("nvfp4",), gpu=_TRANSFORMER_ENGINE),
    "moe_router_dtype": Open(choices=("fp32", "fp64")),
    "moe_token_dispatcher_type": Open(choices=("alltoall", "flex")),
    "moe_shared_expert_overlap": Open(gpu="it overlaps streams of a GPU"),
    "moe_enable_deepep": Open(gpu=_DEEPEP),
    "moe_flex_dispatcher_backend": Open(choices=("deepep", "hybridep"), gpu=_DEEPEP),
    "moe_deepep_num_sms": Open(least=1, gpu=_DEEPEP),
    "moe_hybridep_num_sms": Open(least=1, gpu=_DEEPEP),
    "cp_comm_type": Open(
        choices=("p2p", "all_gather", "a2a"), gpu="Transformer Engine's attention alone reads it"
    ),
    "batch_p2p_comm": Open(gpu="gloo does not batch sends"),
    "batch_p2p_sync": Open(gpu="gloo does not batch sends"),
    **dict.fromkeys(
        (
            "cpu_offloading",
            "cpu_offloading_activations",
            "cpu_offloading_weights",
            "cpu_offloading_double_buffering",
            "fine_grained_activation_offloading",
        ),
        Open(gpu=_OFFLOAD),
    ),
    "cpu_offloading_num_layers": Open(least=0, gpu=_OFFLOAD),
    "offload_modules": Open(
        choices=(
            "attn_norm",
            "qkv_linear",
            "core_attn",
            "attn_proj",
            "mlp_norm",
            "expert_fc1",
            "moe_act",
        ),
        gpu=_OFFLOAD,
    ),
    "min_offloaded_tensor_size": Open(least=0, gpu=_OFFLOAD),
}

OPEN_DDP: Mapping[str, Open] = {
    "grad_reduce_in_fp32": _SWITCH,
    "overlap_grad_reduce": _SWITCH,
    "check_for_nan_in_grad": _SWITCH,
    "check_for_large_grads": _SWITCH,
    "bucket_size": Open(least=1),
    "pad_buckets_for_high_nccl_busbw": _SWITCH,
    "reduce_scatter_with_fp32_accumulation": Open(gpu="gloo has no such collective"),
    "nccl_ub": Open(gpu="its buffers are NCCL's"),
    "disable_symmetric_registration": Open(gpu="its buffers are NCCL's"),
}

_STATE = ("float32", "float16", "bfloat16", "uint8")

OPEN_OPTIMIZER: Mapping[str, Open] = {
    "use_precision_aware_optimizer": Open(gpu=_FUSED_ADAM),
    "store_param_remainders": Open(gpu=_FUSED_ADAM),
    "main_grads_dtype": Open(choices=("float32", "bfloat16"), gpu=_FUSED_ADAM),
    "main_params_dtype": Open(choices=("float32", "float16"), gpu=_FUSED_ADAM),
    # uint8 holds FP8.
    "exp_avg_dtype": Open(choices=_STATE, gpu=_FUSED_ADAM),
    "exp_avg_sq_dtype": Open(choices=_STATE, gpu=_FUSED_ADAM),
    "optimizer_offload_fraction": Open(least=0.0, most=1.0),
    **dict.fromkeys(
        (
            "optimizer_cpu_offload",
            "use_torch_optimizer_for_cpu_offload",
            "overlap_cpu_optimizer_d2h_h2d",
            "pin_cpu_grads",
            "pin_cpu_params",
        ),
        Open(gpu=_OFFLOAD),
    ),
}

DTYPES = ("main_grads_dtype", "main_params_dtype", "exp_avg_dtype", "exp_avg_sq_dtype")
"""Options of the optimizer whose values name a type of numbers."""


@dataclass(frozen=True, slots=True)
class Group:
    """One of Megatron-core's config classes, as the section holds it."""

    prefix: str
    """Before its keys: empty, or `ddp.`."""
    class_name: str
    owned: Mapping[str, str]
    """What is not the section's to set, and why."""
    open: Mapping[str, Open]


TRANSFORMER = Group("", "TransformerConfig", OWNED_TRANSFORMER, OPEN_TRANSFORMER)
DDP = Group("ddp.", "DistributedDataParallelConfig", OWNED_DDP, OPEN_DDP)
OPTIMIZER = Group("optimizer.", "OptimizerConfig", OWNED_OPTIMIZER, OPEN_OPTIMIZER)
GROUPS = (TRANSFORMER, DDP, OPTIMIZER)

_OFF = (False, None, "float32")
"""Values that leave an option as it is where there is no GPU."""


def refuse_value(option: Open, value: Any, *, device: str) -> str | None:
    """Why a run could not use this value, of the right type, of an open option; None if it could."""
    items = value if isinstance(value, list) else [value]
    for item in items:
        if option.choices and item is not None and item not in option.choices:
            return f"it must be {'made of' if value is items else 'one of'} {', '.join(map(str, option.choices))}"
        is_number = isinstance(item, int | float) and not isinstance(item, bool)
        if is_number and option.least is not None and not item >= option.least:
            return f"it must be at least {option.least:g}"
        if is_number and option.most is not None and not item <= option.most:
            return f"it must be at most {option.most:g}"
    if device == "cpu" and option.gpu and value not in _OFF:
        return f"{option.gpu}, and trainer.device is cpu"
    return None


def refuse_together(section: Mapping[str, Any], *, device: str) -> Iterator[tuple[str, str]]:
    """`(key, sentence)` for open options, each right by itself, that do not go together."""
    granularity, method = section.get("recompute_granularity"), section.get("recompute_method")
    count = section.get("recompute_num_layers")
    if granularity == "full" and method is None:
        yield "recompute_granularity", "'full' wants megatron.recompute_method: uniform or block"
    if granularity == "full" and count is None:
        yield "recompute_granularity", "'full' wants megatron.recompute_num_layers, such as 1"
    if granularity == "selective" and count is not None:
        yield (
            "recompute_num_layers",
            "it is for recompute_granularity: full; 'selective' has recompute_modules",
        )
    for key, value in (("recompute_method", method), ("recompute_num_layers", count)):
        if granularity is None and value is not None:
            yield key, "it has no effect without megatron.recompute_granularity"
    if granularity != "selective" and section.get("recompute_modules"):
        yield "recompute_modules", "it is for megatron.recompute_granularity: selective"
    if granularity == "full" and section.get("moe_layer_recompute"):
        yield "moe_layer_recompute", "megatron.recompute_granularity: full recomputes all layers already"
    modules = section.get("recompute_modules") or ()
    if (
        section.get("moe_shared_expert_overlap")
        and granularity == "selective"
        and "shared_experts" in modules
    ):
        yield "recompute_modules", "shared_experts does not go with megatron.moe_shared_expert_overlap"
    if section.get("cpu_offloading") and granularity is not None:
        yield "cpu_offloading", "it does not go with megatron.recompute_granularity"
    dispatcher = section.get("moe_token_dispatcher_type")
    if dispatcher == "flex" and device == "cpu":
        yield "moe_token_dispatcher_type", f"{_DEEPEP}, and trainer.device is cpu; leave 'alltoall'"
    if section.get("moe_enable_deepep") and dispatcher != "flex":
        yield "moe_enable_deepep", "it wants megatron.moe_token_dispatcher_type: flex"
    optimizer = section.get("optimizer")
    if isinstance(optimizer, Mapping):
        yield from _refuse_in_optimizer(optimizer)


def _refuse_in_optimizer(optimizer: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for key in DTYPES:
        if optimizer.get(key, "float32") != "float32" and not optimizer.get("use_precision_aware_optimizer"):
            yield f"optimizer.{key}", "it wants megatron.optimizer.use_precision_aware_optimizer: true"
    if optimizer.get("optimizer_offload_fraction") and not optimizer.get("optimizer_cpu_offload"):
        yield (
            "optimizer.optimizer_offload_fraction",
            "it wants megatron.optimizer.optimizer_cpu_offload: true",
        )
