"""Which options of sglang-router the section `engines.router.options` may set.

As in `sglang_options`: open is what decides how requests are spread, limits and retries; an option that stands in no
list here is refused until somebody has decided where it belongs.
"""

from __future__ import annotations

from collections.abc import Mapping

_ENGINES = "the router is told the run's engines"
_PAIRS = "set engines.num_prefill"
_FOUND = "its engines are the run's, and nobody looks for others"
_TEXT = "policies send token ids"
_LOCAL = "the router is asked by this host alone, over plain HTTP, and stores nothing"

SET_ROUTER: Mapping[str, str] = {
    "host": "set engines.router.host",
    "port": "set engines.router.port",
    "policy": "set engines.router.policy",
    "worker_urls": _ENGINES,
    "pd_disaggregation": _PAIRS,
    "prefill_urls": _PAIRS,
    "decode_urls": _PAIRS,
    "prometheus_host": "its metrics are for this host alone",
    "prometheus_port": "its metrics are for this host alone",
    "health_check_endpoint": "an engine that is paused for a weight update must not count as sick",
    "request_timeout_secs": "set engines.request_timeout_s",
    "shutdown_grace_period_secs": "a run that ends does not wait for it",
}
"""What Polyturn itself sets on the router's command line (`rollout/engines/server.py`), and what decides it."""

REFUSED_ROUTER: Mapping[str, str] = {
    "mini_lb": "it is for debugging alone",
    "backend": "engines are SGLang's",
    "assignment_mode": "the policy manual is not used (docs/engines.md)",
    "max_idle_secs": "the policy manual is not used (docs/engines.md)",
    "enable_igw": "a run serves one model here",
    **dict.fromkeys(
        (
            "service_discovery",
            "selector",
            "service_discovery_port",
            "service_discovery_namespace",
            "prefill_selector",
            "decode_selector",
            "bootstrap_port_annotation",
        ),
        _FOUND,
    ),
    **dict.fromkeys(
        (
            "model_path",
            "tokenizer_path",
            "chat_template",
            "reasoning_parser",
            "tool_call_parser",
            "mcp_config_path",
            "tokenizer_cache_enable_l0",
            "tokenizer_cache_enable_l1",
            "tokenizer_cache_l0_max_entries",
            "tokenizer_cache_l1_max_memory",
        ),
        _TEXT,
    ),
    **dict.fromkeys(
        (
            "api_key",
            "request_id_headers",
            "cors_allowed_origins",
            "history_backend",
            "oracle_wallet_path",
            "oracle_tns_alias",
            "oracle_connect_descriptor",
            "oracle_username",
            "oracle_password",
            "oracle_pool_min",
            "oracle_pool_max",
            "oracle_pool_timeout_secs",
            "postgres_db_url",
            "postgres_pool_max",
            "redis_url",
            "redis_pool_max",
            "redis_retention_days",
            "client_cert_path",
            "client_key_path",
            "ca_cert_paths",
            "server_cert_path",
            "server_key_path",
            "control_plane_api_keys",
            "control_plane_audit_enabled",
            "jwt_issuer",
            "jwt_audience",
            "jwt_jwks_uri",
            "jwt_role_mapping",
        ),
        _LOCAL,
    ),
}
"""What nobody sets, and why."""

ROUTER_DEFAULTS: Mapping[str, object] = {
    "health_check_interval_secs": 2,
    "health_failure_threshold": 2,
    "health_success_threshold": 1,
    "cb_failure_threshold": 3,
    "cb_success_threshold": 1,
    "cb_timeout_duration_secs": 5,
    "worker_startup_check_interval": 1,
    "log_level": "warn",
}
"""What the router has where the section says nothing."""

OPEN_ROUTER = frozenset(
    """
    balance_abs_threshold balance_rel_threshold bucket_adjust_interval_secs cache_threshold cb_window_duration_secs
    decode_policy disable_circuit_breaker disable_health_check disable_retries dp_aware enable_trace
    eviction_interval_secs health_check_timeout_secs log_dir max_concurrent_requests max_payload_size max_tree_size
    otlp_traces_endpoint prefill_policy prometheus_duration_buckets queue_size queue_timeout_secs
    rate_limit_tokens_per_second retry_backoff_multiplier retry_initial_backoff_ms retry_jitter_factor
    retry_max_backoff_ms retry_max_retries worker_startup_timeout_secs
    """.split()  # noqa: SIM905
) | set(ROUTER_DEFAULTS)
