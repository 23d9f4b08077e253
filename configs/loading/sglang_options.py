"""Which options of the SGLang server the `sglang:` section may set.

Open is what decides memory, communication, speed, logs, or a precision that it names. What changes the function that
the engines compute or how they sample from it, where weights come from, or how the engines are placed and asked, is
decided elsewhere, or not at all. An option that stands in no list here is refused until somebody has decided where it
belongs. The validation of a config, the builder of a server's command line and the tables of docs/configuration.md all
read these lists.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_LAYOUT = "the engines' layout is engines.num_engines, engines.tensor_parallel and engines.ranks_per_node"
_WHOLE = (
    "how prefill and decode share their work is engines.num_prefill; weights and pauses reach whole engines"
)
_WEIGHTS = "weights come from model.path, and then from the trainer"
_PRECISION = "set weight_sync.dtype"
_FUNCTION = "it changes what the engines compute, and the trainer's logprobs would be another model's"
_SAMPLING = "set rollout.sampling: whatever else changes the distribution, the trainer could not replay"
_CODE = "it runs code, which neither a model's directory nor this section may name"
_ADAPTERS = (
    "set trainer.lora, and weight_sync.kind=adapter where engines are to serve the adapters themselves"
)
_TEXT = "policies read and write text"
_RENDERED = "Polyturn renders and reads conversations itself; set model.dialect"
_STALE = "what is cached outside of an engine outlives the weights that made it"
_PROTOCOL = "Polyturn talks to its engines by plain HTTP and reads SGLang's own answers"

SET_SGLANG: Mapping[str, str] = {
    "model_path": "set model.path",
    "weight_version": "weight sync stamps the version",
    "host": "set engines.host",
    "port": "set engines.port",
    "device": "set engines.device",
    "base_gpu_id": "an engine sees its own GPUs alone",
    "tp_size": "set engines.tensor_parallel",
    "nnodes": "set engines.ranks_per_node: an engine stands on as many nodes as it has ranks for",
    "node_rank": "it follows from engines.ranks_per_node",
    "disaggregation_mode": "set engines.num_prefill",
    "disaggregation_bootstrap_port": "a free one is chosen where the engine runs; set engines.num_prefill",
    "dist_init_addr": "the nodes of an engine meet at a port that is free on the first of them",
    "dtype": "set model.dtype",
    "random_seed": "set seed",
    "enable_deterministic_inference": "set rollout.sampling.seeded",
    "enable_memory_saver": "set engines.placement",
    "enable_return_routed_experts": "set engines.routing_replay",
    "sampling_mask_max_tokens": "set rollout.sampling.top_k",
    "skip_server_warmup": "the readiness check is the warm-up",
    "log_level_http": "the engine's log would fill with one line a request",
}
"""What Polyturn itself sets on the command line of every server (`rollout/engines/server.py`), and what decides it."""

SET_SGLANG_ON_CPU: Mapping[str, str] = {
    "attention_backend": "only torch_native runs on a CPU",
    "cuda_graph_backend_decode": "there are no CUDA graphs on a CPU",
    "cuda_graph_backend_prefill": "there are no CUDA graphs on a CPU",
}
"""What it sets on a CPU alone; on a GPU these are open."""

REFUSED_SGLANG: Mapping[str, str] = {
    "tokenizer_path": "set model.path",
    "served_model_name": "nothing of Polyturn asks for it by name",
    "dp_size": "copies of the model are engines.num_engines; attention in data-parallel parts is sglang.attn_dp_size",
    "gpu_id_step": "an engine sees its own GPUs alone",
    "delete_ckpt_after_loading": "it would delete model.path",
    "allow_auto_truncate": "prompts would be cut without a word; set environment.max_tokens_per_episode",
    "skip_tokenizer_init": "evaluation and health checks send text",
    "api_key": "engines listen on engines.host alone and are called without a key",
    **dict.fromkeys(
        (
            "attn_cp_size",
            "dcp_size",
            "dwdp_size",
            "elastic_ep_backend",
            "elastic_ep_initial_size",
            "elastic_ep_scale_timeout",
            "enable_prefill_cp",
            "ep_join_mode",
            "ep_join_rank_offset",
            "max_ep_size",
            "moe_dp_size",
            "nccl_port",
            "pp_async_batch_depth",
            "pp_max_micro_batch_size",
            "pp_size",
            "use_ray",
        ),
        _LAYOUT,
    ),
    **dict.fromkeys(
        (
            "decoupled_spec_bind_endpoint",
            "decoupled_spec_connect_endpoints",
            "decoupled_spec_rank",
            "decoupled_spec_role",
            "disaggregation_decode_allocation_policy",
            "disaggregation_decode_enable_offload_kvcache",
            "disaggregation_decode_enable_radix_cache",
            "disaggregation_decode_extra_slots",
            "disaggregation_decode_host_receive_threshold",
            "disaggregation_decode_polling_interval",
            "disaggregation_decode_retraction_backup",
            "disaggregation_enable_kv_checksum",
            "enable_pd_role_switch",
            "enable_pdmux",
            "num_reserved_decode_tokens",
            "pdmux_config_path",
        ),
        _WHOLE,
    ),
    **dict.fromkeys(
        (
            "checkpoint_engine_wait_weights_before_ready",
            "custom_weight_loader",
            "decrypted_config_file",
            "decrypted_draft_config_file",
            "download_dir",
            "engine_info_bootstrap_port",
            "kt_cpuinfer",
            "kt_max_deferred_experts_per_token",
            "kt_method",
            "kt_num_gpu_experts",
            "kt_threadpool_count",
            "kt_weight_path",
            "load_format",
            "model_checksum",
            "model_config_parser",
            "model_loader_extra_config",
            "modelexpress_config",
            "remote_instance_weight_loader_backend",
            "remote_instance_weight_loader_seed_instance_ip",
            "remote_instance_weight_loader_seed_instance_service_port",
            "remote_instance_weight_loader_send_weights_group_ports",
            "remote_instance_weight_loader_start_seed_via_transfer_engine",
            "revision",
            "startup_weight_load_mode",
            "weight_cache_mode",
            "weight_cache_socket",
            "weight_cache_timeout",
        ),
        _WEIGHTS,
    ),
    **dict.fromkeys(
        (
            "modelopt_checkpoint_restore_path",
            "modelopt_checkpoint_save_path",
            "modelopt_export_path",
            "modelopt_quant",
            "quantization",
            "quantization_param_path",
            "quantize_and_serve",
            "rl_quant_profile",
        ),
        _PRECISION,
    ),
    **dict.fromkeys(
        (
            "dllm_algorithm",
            "dllm_algorithm_config",
            "dllm_fdfo",
            "enable_mis",
            "enable_watermark",
            "is_embedding",
            "json_model_override_args",
            "model_impl",
            "prefill_only_disable_kv_cache",
            "speculative_accept_threshold_acc",
            "speculative_accept_threshold_single",
            "speculative_use_rejection_sampling",
            "watermark_config",
        ),
        _FUNCTION,
    ),
    **dict.fromkeys(
        (
            "enable_custom_logit_processor",
            "mlx_enable_sampling",
            "preferred_sampling_params",
            "sampling_defaults",
        ),
        _SAMPLING,
    ),
    **dict.fromkeys(
        (
            "custom_sigquit_handler",
            "forward_hooks",
            "sidecar",
            "sidecar_args",
            "stat_loggers",
            "trust_remote_code",
        ),
        _CODE,
    ),
    **dict.fromkeys(
        (
            "enable_lora",
            "enable_lora_overlap_loading",
            "experts_shared_outer_loras",
            "lora_backend",
            "lora_drain_wait_threshold",
            "lora_eviction_policy",
            "lora_paths",
            "lora_strict_loading",
            "lora_target_modules",
            "lora_use_virtual_experts",
            "max_loaded_loras",
            "max_lora_chunk_size",
            "max_lora_rank",
            "max_loras_per_batch",
            "uno_lora_path",
        ),
        _ADAPTERS,
    ),
    **dict.fromkeys(
        (
            "allowed_media_domains",
            "asr_max_buffer_seconds",
            "asr_max_concurrent_sessions",
            "disable_fast_image_processor",
            "enable_adaptive_dispatch_to_encoder",
            "enable_broadcast_mm_inputs_process",
            "enable_encoder_swa_bounded_replay",
            "enable_mm_global_cache",
            "enable_multimodal",
            "enable_precise_embedding_interpolation",
            "enable_prefix_mm_cache",
            "encoder_bootstrap_port",
            "encoder_only",
            "encoder_register_urls",
            "encoder_transfer_backend",
            "encoder_urls",
            "image_processor_backend",
            "language_model_only",
            "language_only",
            "limit_mm_data_per_request",
            "media_url_max_file_size_mb",
            "mm_attention_backend",
            "mm_enable_dp_encoder",
            "mm_feature_transport",
            "mm_global_cache_backend",
            "mm_io_worker_num",
            "mm_preprocess_cache_size_mb",
            "mm_process_config",
            "mm_processor_worker_num",
            "trust_mm_content_hashes",
        ),
        _TEXT,
    ),
    **dict.fromkeys(
        (
            "chat_template",
            "completion_template",
            "default_chat_template_kwargs",
            "enable_strict_thinking",
            "hf_chat_template_name",
            "reasoning_parser",
            "strip_thinking_cache",
            "tool_call_parser",
            "tool_server",
            "trust_request_chat_template",
        ),
        _RENDERED,
    ),
    **dict.fromkeys(
        (
            "enable_flexkv",
            "enable_lmcache",
            "enable_unified_cache_external_linker",
            "flexkv_config_file",
            "hicache_storage_backend",
            "hicache_storage_backend_extra_config",
            "hicache_storage_prefetch_policy",
            "hicache_storage_prefetch_retry_max_attempts",
            "hicache_storage_prefetch_retry_poll_interval",
            "lmcache_config_file",
            "unified_cache_external_linker_backend",
            "unified_cache_external_linker_config",
        ),
        _STALE,
    ),
    **dict.fromkeys(
        (
            "admin_api_key",
            "enable_http2",
            "enable_http_worker_reuseport",
            "enable_response_store",
            "enable_ssl_refresh",
            "fastapi_root_path",
            "file_storage_path",
            "gated_launch_port",
            "grpc_mode",
            "grpc_port",
            "grpc_response_timeout_secs",
            "http2_initial_connection_window_size",
            "http2_max_concurrent_streams",
            "incremental_streaming_output",
            "return_input_ids",
            "return_output_ids",
            "smg_grpc_mode",
            "smg_http_sidecar_port",
            "ssl_ca_certs",
            "ssl_certfile",
            "ssl_keyfile",
            "ssl_keyfile_password",
            "stream_response_default_include_usage",
        ),
        _PROTOCOL,
    ),
}
"""What nobody sets, and why."""

OPEN_SGLANG = frozenset(
    """
    abort_on_priority_when_disabled attention_backend attn_dp_size batch_notify_size bf16_gemm_backend
    boundary_reduction bucket_e2e_request_latency bucket_inter_token_latency bucket_time_to_first_token
    c128_page_size chunked_prefill_size constrained_json_disable_any_whitespace
    constrained_json_max_whitespace_cnt constrained_json_whitespace_pattern context_length cp_strategy
    cpu_offload_gb crash_dump_folder cuda_graph_backend_decode cuda_graph_backend_prefill
    cuda_graph_bs_decode cuda_graph_bs_prefill cuda_graph_config cuda_graph_max_bs_decode
    cuda_graph_max_bs_prefill cuda_graph_max_seq_len_prefill cuda_graph_prefill_max_context
    disaggregation_ib_device disaggregation_transfer_backend
    dcp_comm_backend dcp_replicate_q_proj debug_cuda_graph debug_tensor_dump_input_file
    debug_tensor_dump_layers debug_tensor_dump_output_folder decode_attention_backend decode_log_interval
    deepep_config deepep_dispatcher_output_dtype deepep_mode deepep_v2_mode default_priority_value
    detokenizer_worker_num disable_aiter_allreduce_fusion_in_decode
    disable_aiter_allreduce_fusion_in_prefill disable_attn_tp_gather disable_chunked_prefix_cache
    disable_cuda_graph_padding disable_custom_all_reduce disable_decode_cuda_graph
    disable_flashinfer_autotune disable_flashinfer_cutlass_moe_fp4_allgather disable_hybrid_swa_memory
    disable_outlines_disk_cache disable_overlap_schedule disable_prefill_cuda_graph
    disable_priority_preemption disable_radix_cache disable_shared_experts_fusion
    disable_tokenizer_batch_decode dist_timeout dsa_decode_backend dsa_paged_mqa_logits_backend
    dsa_prefill_backend dsa_topk_backend dsa_triton_union dsv4_attn_backend dsv4_prefill_backend
    dynamic_batch_tokenizer_batch_size dynamic_batch_tokenizer_batch_timeout enable_aiter_allreduce_fusion
    enable_amd_monokernel enable_attn_tp_input_scattered enable_cache_report enable_cp_decode_attn_tp
    enable_cudagraph_gc enable_decoder_swa_bounded_replay enable_deepseek_v4_fp4_indexer
    enable_dense_mlp_attn_tp enable_dp_attention_local_control_broadcast enable_dp_lm_head
    enable_draft_weights_cpu_backup enable_dsa_cache_layer_split enable_dsa_fused_indexer
    enable_dynamic_batch_tokenizer enable_dynamic_chunking enable_elastic_expert_backup enable_eplb
    enable_forward_pass_metrics enable_fp32_lm_head enable_fused_moe_sum_all_reduce
    enable_fused_qk_norm_rope enable_hierarchical_cache enable_hisparse enable_int8_mamba_checkpoint
    enable_kv_cache_sharding enable_layernorm_sp enable_layerwise_nvtx_marker enable_lean_attention
    enable_linear_replayssm enable_linear_replayssm_spec enable_linker_mla_dedup
    enable_mamba_cache_stochastic_rounding enable_megamoe_for_layernorm_sp
    enable_metrics enable_metrics_for_all_schedulers enable_mfu_metrics enable_mixed_chunk enable_mscclpp
    enable_multi_layer_eagle enable_nccl_nvls enable_nvidia_megakernel enable_p2p_check
    enable_page_major_kv_layout enable_paged_experts enable_prefill_delayer enable_priority_scheduling
    enable_profile_cuda_graph enable_quant_communications enable_request_time_stats_logging
    enable_return_aux_hidden_states enable_return_hidden_states enable_return_indexer_topk
    enable_scattered_sconv enable_session_radix_cache enable_shared_experts_attn_tp
    enable_single_batch_overlap enable_streaming_session enable_symm_mem enable_tf32_matmul
    enable_tokenizer_batch_encode enable_torch_compile enable_torch_compile_debug_mode
    enable_torch_symm_mem enable_tp_lm_head_all_to_all enable_trace enable_two_batch_overlap
    enable_unified_memory enable_w4a4_mxfp4_megamoe enable_waterfill enable_weights_cpu_backup
    enforce_disable_flashinfer_allreduce_fusion enforce_shared_experts_fusion ep_dispatch_algorithm
    ep_num_redundant_experts ep_size eplb_algorithm eplb_min_rebalancing_utilization_threshold
    eplb_rebalance_layers_per_chunk eplb_rebalance_num_iterations expert_balancedness_report_mode
    expert_distribution_recorder_buffer_size expert_distribution_recorder_mode export_metrics_to_file
    export_metrics_to_file_dir extra_metric_labels flashinfer_a2a_dispatch_type
    flashinfer_allreduce_fusion_backend flashinfer_autotune_skip_ops flashinfer_mla_disable_ragged
    flashinfer_mxfp4_moe_precision forward_pass_metrics_ipc_name forward_pass_metrics_worker_id
    fp4_gemm_runner_backend fp8_gemm_runner_backend fuseep_mode gc_threshold gc_warning_threshold_secs
    generation_tokens_buckets grammar_backend hicache_host_memory_fraction hicache_host_memory_mode
    hicache_io_backend hicache_mem_layout hicache_ratio hicache_size hicache_write_policy hisparse_config
    init_expert_location int8_mamba_ckpt_size kv_cache_dtype kv_canary kv_canary_real_data
    kv_canary_sweep_interval kv_events_config linear_attn_backend linear_attn_decode_backend
    linear_attn_prefill_backend linear_attn_verify_backend linear_replayssm_cache_len load_balance_method
    load_publish_endpoint load_snapshot_publish_interval log_level log_requests log_requests_format
    log_requests_level log_requests_target mamba_backend mamba_cache_philox_rounds mamba_full_memory_ratio
    mamba_max_states_per_path mamba_radix_cache_strategy mamba_ssm_dtype mamba_track_interval
    max_mamba_cache_size max_prefill_tokens max_queued_requests max_running_requests max_total_tokens
    mem_fraction_static min_free_slots_delay moe_a2a_backend moe_dense_tp_size moe_runner_backend
    mooncake_ib_device msprobe_dump_config num_continuous_decode_steps numa_node offload_group_size
    offload_mode offload_num_in_group offload_prefetch_step optimistic_prefill_attempts otlp_service_name
    otlp_traces_endpoint page_size paged_experts_num_resident ple_offload_backend ple_offload_dir
    ple_offload_embedding pre_warm_nccl prefill_attention_backend prefill_decode_interval
    prefill_decode_interval_min_bs prefill_delayer_forward_passes_buckets prefill_delayer_max_delay_ms
    prefill_delayer_max_delay_passes prefill_delayer_queue_min_ratio
    prefill_delayer_token_usage_low_watermark prefill_delayer_wait_seconds_buckets
    prefill_kv_cache_dequant_dtype prefill_max_requests priority_scheduling_preemption_threshold
    prompt_tokens_buckets qsa_indexer_dtype radix_cache_backend radix_eviction_policy
    radix_eviction_policy_config retraction_policy return_aux_hidden_state_layer_ids
    return_hidden_states_mode rl_on_policy_target schedule_conservativeness
    schedule_low_priority_values_first schedule_policy scheduler_recv_interval shared_experts_tp_size
    show_time_cost sleep_on_idle sm_group_num soft_watchdog_timeout spec_trace_dir speculative_adaptive
    speculative_adaptive_config speculative_algorithm speculative_attention_mode
    speculative_dflash_block_size speculative_domino_candidate_pool_size
    speculative_draft_attention_backend speculative_draft_kv_cache_dtype speculative_draft_load_format
    speculative_draft_model_path speculative_draft_model_quantization speculative_draft_model_revision
    speculative_draft_sink_size speculative_draft_window_size speculative_dsa_topk_backend
    speculative_dspark_align_verify_tokens_to_graph_tier speculative_dspark_block_size
    speculative_dspark_confidence_sts_path speculative_dspark_sps_table_path speculative_eagle_topk
    speculative_enable_w4a4_mxfp4_megamoe speculative_moe_a2a_backend speculative_moe_runner_backend
    speculative_ngram_capacity speculative_ngram_external_corpus_max_tokens
    speculative_ngram_external_corpus_path speculative_ngram_external_sam_budget
    speculative_ngram_match_type speculative_ngram_max_bfs_breadth speculative_ngram_max_trie_depth
    speculative_ngram_min_bfs_breadth speculative_num_draft_tokens speculative_num_steps
    speculative_token_map speculative_use_block_verification stream_interval swa_full_tokens_ratio
    swa_prefix_tails tbo_token_distribution_threshold tokenizer_backend
    tokenizer_metrics_allowed_custom_labels tokenizer_metrics_custom_labels_header tokenizer_mode
    tokenizer_worker_num torch_compile_max_bs trace_modules triton_attention_num_kv_splits
    triton_attention_reduce_in_fp32 triton_attention_split_tile_size uvicorn_access_log_exclude_prefixes
    warmups watchdog_timeout weight_loader_disable_mmap weight_loader_drop_cache_after_load
    weight_loader_prefetch_checkpoints weight_loader_prefetch_num_threads
    """.split()  # noqa: SIM905
)

BOUNDS: Mapping[str, tuple[float, float]] = {
    "mem_fraction_static": (0.01, 0.99),
    "max_total_tokens": (1, float("inf")),
    "max_running_requests": (1, float("inf")),
    "max_prefill_tokens": (1, float("inf")),
    "chunked_prefill_size": (-1, float("inf")),
    "context_length": (1, float("inf")),
    "page_size": (1, float("inf")),
    "ep_size": (1, float("inf")),
    "attn_dp_size": (1, float("inf")),
    "moe_dense_tp_size": (1, float("inf")),
}
"""The least and the most of numbers with which a server would start, and end again."""


def set_by_polyturn(device: str) -> dict[str, str]:
    """What Polyturn sets on the command line of a server on `device`: option, and what decides it."""
    return {**SET_SGLANG, **(SET_SGLANG_ON_CPU if device == "cpu" else {})}


def attention_parts(section: Mapping[str, Any]) -> int:
    """Data-parallel parts of an engine's attention: each has its own share of the requests and of the ranks."""
    return _count(section, "attn_dp_size", "attention_data_parallel_size")


def expert_parts(section: Mapping[str, Any]) -> int:
    """Parts that an engine's experts are divided into, over its ranks."""
    return _count(section, "ep_size", "expert_parallel_size", "ep")


def _count(section: Mapping[str, Any], *names: str) -> int:
    given = next((section[name] for name in names if section.get(name) is not None), 1)
    return given if isinstance(given, int) else 1
