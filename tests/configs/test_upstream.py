"""The free sections are checked against the installed packages, without importing them."""

from __future__ import annotations

import ast
import copy
import dataclasses
import importlib.util
import itertools
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest

from polyturn.configs.errors import ConfigError
from polyturn.configs.loading import upstream
from polyturn.configs.loading.loader import load_config
from polyturn.configs.loading.megatron_options import DTYPES, GROUPS, OPEN_OPTIMIZER
from polyturn.configs.loading.router_options import OPEN_ROUTER, REFUSED_ROUTER, ROUTER_DEFAULTS, SET_ROUTER
from polyturn.configs.loading.sglang_options import (
    BOUNDS,
    OPEN_SGLANG,
    REFUSED_SGLANG,
    SET_SGLANG,
    SET_SGLANG_ON_CPU,
    set_by_polyturn,
)
from polyturn.configs.loading.upstream import accepts
from polyturn.configs.schema.engines import EnginesConfig
from polyturn.rollout.engines.server import CPU_DEFAULTS, EngineSpec, NodePart, server_arguments

needs_sglang = pytest.mark.skipif(
    importlib.util.find_spec("sglang") is None, reason="SGLang is not installed"
)
needs_megatron = pytest.mark.skipif(
    importlib.util.find_spec("megatron") is None, reason="Megatron-core is not installed"
)


def problems(section: str, device: str = "cpu", **values: Any) -> list[str]:
    return [problem for _, problem in upstream.find_problems(section, values, device=device)]


@needs_sglang
def test_unknown_and_ill_typed_server_arguments() -> None:
    assert problems("sglang", max_total_token=1) == [
        "unknown key 'sglang.max_total_token', did you mean 'sglang.max_total_tokens'?"
    ]
    assert problems("sglang", mem_fraction_static="half") == [
        "'sglang.mem_fraction_static' must be a number, got 'half'"
    ]
    assert "must be one of 'lpm'" in problems("sglang", schedule_policy="fifo")[0]
    good = {
        "max_total_tokens": 4096,
        "mem_fraction_static": 0.5,
        "schedule_policy": "fcfs",
        "kv_cache_dtype": "auto",
    }
    assert problems("sglang", **good) == []


@needs_sglang
def test_server_arguments_that_are_ours_are_refused_with_the_reason() -> None:
    assert problems("sglang", model_path="x") == ["'sglang.model_path' is not yours to set: set model.path"]
    alias = problems("sglang", tensor_parallel_size=2)
    assert alias == ["'sglang.tensor_parallel_size' is not yours to set: set engines.tensor_parallel"]
    assert problems("sglang", device="cuda", attention_backend="triton") == []
    assert problems("sglang", attention_backend="triton") != []


@needs_sglang
def test_every_server_argument_is_open_or_owned() -> None:
    known = upstream.sglang_arguments()
    assert known is not None
    fields = {argument.field for argument in known.values()}
    # An argument of a new release belongs in one of the lists before anybody may set it.
    assert set(SET_SGLANG) | set(REFUSED_SGLANG) | OPEN_SGLANG == fields
    assert not (set(SET_SGLANG) | set(REFUSED_SGLANG)) & OPEN_SGLANG
    assert not set(SET_SGLANG) & set(REFUSED_SGLANG)
    assert set(SET_SGLANG_ON_CPU) | set(BOUNDS) <= OPEN_SGLANG


@needs_sglang
def test_every_argument_of_the_router_is_open_or_owned() -> None:
    known = upstream.router_arguments()
    assert known is not None
    assert set(SET_ROUTER) | set(REFUSED_ROUTER) | OPEN_ROUTER == set(known)
    assert not (set(SET_ROUTER) | set(REFUSED_ROUTER)) & OPEN_ROUTER and not set(SET_ROUTER) & set(
        REFUSED_ROUTER
    )
    assert set(ROUTER_DEFAULTS) <= OPEN_ROUTER


@needs_sglang
def test_router_options_are_told_with_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "extends: quickstart\nengines:\n  router:\n    policy: cache_aware\n    options:\n      port: 3\n"
        "      cache_treshold: 0.5\n      queue_size: many\n      retry_max_retries: 2\n"
    )
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert str(caught.value).splitlines() == [
        f"{path}:6: 'engines.router.options.port' is not yours to set: set engines.router.port",
        f"{path}:7: unknown key 'engines.router.options.cache_treshold', did you mean "
        "'engines.router.options.cache_threshold'?",
        f"{path}:8: 'engines.router.options.queue_size' must be an integer, got 'many'",
    ]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_command_line_sets_what_the_table_says(device: Literal["cpu", "cuda"]) -> None:
    spec = EngineSpec(
        config=EnginesConfig(device=device),
        records_routing=True,
        model_path=Path("m"),
        log_directory=Path("logs"),
        dtype="float32",
        seeded=True,
        num_sharing=1,
        largest_support=104,
        num_prefill=1,
    )
    part = NodePart(node_rank=0, num_nodes=2, rendezvous="10.0.0.1:2")
    words = server_arguments(spec, port=1, part=part, rendezvous="10.0.0.1:2", bootstrap_port=3)
    flags = {word for word in words if word.startswith("--")}
    options = {flag.removeprefix("--").replace("-", "_") for flag in flags}
    expected = set(set_by_polyturn(device))
    if device == "cpu":
        assert options - set(CPU_DEFAULTS) == expected - {"enable_memory_saver"}, "there is none to be had"
    else:
        # Where the GPU is shared; a user may say another one.
        assert options == expected | {"mem_fraction_static"}
        assert "--enable-memory-saver" not in server_arguments(replace(spec, num_sharing=0), port=1)


@needs_sglang
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("enable_return_routed_experts", True),
        ("trust_remote_code", True),
        ("forward_hooks", "[]"),
        ("custom_weight_loader", ["os.system"]),
        ("delete_ckpt_after_loading", True),
        ("allow_auto_truncate", True),
        ("preferred_sampling_params", '{"top_p": 0.9}'),
        ("sampling_defaults", "model"),
        ("json_model_override_args", '{"rope_theta": 1.0}'),
        ("load_format", "dummy"),
        ("quantization", "fp8"),
        ("speculative_accept_threshold_single", 0.5),
        ("enable_watermark", True),
        ("hicache_storage_backend", "file"),
        ("ssl_certfile", "x.pem"),
        ("dp_size", 2),
        ("data_parallel_size", 2),
    ],
)
def test_server_arguments_that_are_not_open(name: str, value: Any, device: str) -> None:
    (problem,) = problems("sglang", device, **{name: value})
    assert problem.startswith(f"'sglang.{name}' is not yours to set: ")
    # The engine's command line asks the same table.
    with pytest.raises(ValueError, match=f"'sglang.{name}' is not yours to set"):
        server_arguments(
            EngineSpec(
                config=EnginesConfig(device=device),  # type: ignore[arg-type]
                model_path=Path("m"),
                log_directory=Path("logs"),
                sglang={name: value},
                dtype="float32",
                seeded=False,
            ),
            port=1,
        )


@needs_sglang
def test_an_argument_that_nobody_has_classified_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    fresh = upstream.Argument("fresh_idea", ast.Name("bool"))
    monkeypatch.setattr(upstream, "sglang_arguments", lambda: {"fresh_idea": fresh})
    assert "has not been decided here" in problems("sglang", fresh_idea=True)[0]


@needs_sglang
@pytest.mark.parametrize(
    ("name", "value"),
    [("mem_fraction_static", 1.5), ("max_total_tokens", 0), ("page_size", -1), ("context_length", 0)],
)
def test_server_arguments_out_of_their_bounds(name: str, value: float) -> None:
    assert problems("sglang", **{name: value})[0].startswith(f"'sglang.{name}' must be at least ")


@needs_megatron
def test_megatron_fields() -> None:
    assert problems("megatron", recompute_num_layer=1) == [
        "unknown key 'megatron.recompute_num_layer', did you mean 'megatron.recompute_num_layers'?"
    ]
    assert problems("megatron", recompute_granularity="all") == [
        "'megatron.recompute_granularity' must be one of 'full', 'selective', got 'all'"
    ]
    assert problems("megatron", num_layers=3) == [
        "'megatron.num_layers' is not yours to set: it changes what the model computes, which its config.json alone "
        "decides"
    ]
    full = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    assert problems("megatron", deterministic_mode=True, **full) == []


@needs_megatron
def test_megatron_fields_read_from_source_are_those_of_the_class() -> None:
    # Imported before it, megatron.core would spoil this process for every later test.
    importlib.import_module("polyturn.trainer.megatron")
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig
    from megatron.core.transformer.transformer_config import TransformerConfig

    classes = (TransformerConfig, DistributedDataParallelConfig, OptimizerConfig)
    for group, config_class in zip(GROUPS, classes, strict=True):
        read = upstream.megatron_arguments(config_class.__name__)
        assert read is not None and group.class_name == config_class.__name__
        true = {field.name for field in dataclasses.fields(config_class) if not field.name.startswith("_")}
        assert set(read) == true
        # A field of a new release belongs in one of the two lists before anybody may set it.
        assert set(group.owned) | set(group.open) == true
        assert not set(group.owned) & set(group.open)
    assert set(DTYPES) <= set(OPEN_OPTIMIZER)


@needs_megatron
def test_fields_of_the_gradient_buffers_and_the_optimizer() -> None:
    assert problems("megatron", ddp={"overlap_grad_reduce": True, "bucket_size": 1000}) == []
    assert problems("megatron", ddp={"bucketsize": 1}) == [
        "unknown key 'megatron.ddp.bucketsize', did you mean 'megatron.ddp.bucket_size'?"
    ]
    assert problems("megatron", ddp={"bucket_size": "large"}) == [
        "'megatron.ddp.bucket_size' must be an integer, got 'large'"
    ]
    assert problems("megatron", ddp=3) == ["'megatron.ddp' must be a section, got 3"]
    assert "set trainer.optimizer.clip_grad" in problems("megatron", optimizer={"clip_grad": 1.0})[0]
    wrong = problems("megatron", "cuda", optimizer={"exp_avg_dtype": "int4"})
    assert wrong == [
        "'megatron.optimizer.exp_avg_dtype' cannot be 'int4': it must be one of float32, float16, bfloat16, uint8"
    ]


@needs_megatron
@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"moe_token_dispatcher_type": "flex"}, "DeepEP sends tokens between GPUs"),
        (
            {"moe_enable_deepep": True, "moe_token_dispatcher_type": "flex"},
            "DeepEP sends tokens between GPUs",
        ),
        ({"fp8": "e4m3"}, "Transformer Engine"),
        ({"attention_backend": "flash"}, "Transformer Engine"),
        (
            {"optimizer": {"optimizer_cpu_offload": True, "optimizer_offload_fraction": 1.0}},
            "no GPU whose memory",
        ),
        ({"optimizer": {"use_precision_aware_optimizer": True}}, "FusedAdam"),
        ({"ddp": {"nccl_ub": True}}, "NCCL"),
    ],
)
def test_what_needs_a_gpu_is_refused_without_one(values: dict[str, Any], why: str) -> None:
    (problem,) = problems("megatron", "cpu", **values)
    assert why in problem
    assert problems("megatron", "cuda", **values) == []


@needs_megatron
def test_a_value_that_switches_a_gpu_option_off_is_no_fault() -> None:
    assert problems("megatron", bias_dropout_fusion=False, batch_p2p_comm=False, fp8=None) == []


@needs_megatron
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("softmax_scale", 0.1),
        ("softmax_type", "off-by-one"),
        ("glu_linear_offset", 1.0),
        ("activation_func_clamp_value", 7.0),
        ("window_size", [128, 0]),
        ("no_rope_freq", 4),
        ("qk_l2_norm", True),
        ("layernorm_zero_centered_gamma", True),
        ("apply_residual_connection_post_layernorm", True),
        ("moe_router_force_load_balancing", True),
        ("moe_expert_capacity_factor", 1.0),
        ("moe_input_jitter_eps", 0.01),
        ("moe_aux_loss_coeff", 0.01),
        ("moe_z_loss_coeff", 1e-3),
        ("moe_router_bias_update_rate", 1e-3),
        ("moe_router_topk_limited_devices", 2),
        ("embedding_init_method_std", 1.0),
        ("fp8_param", True),
        ("fp8_quantizer_factory", "os:system"),
    ],
)
def test_what_changes_the_function_is_not_open(name: str, value: Any, device: str) -> None:
    (problem,) = problems("megatron", device, **{name: value})
    assert problem.startswith(f"'megatron.{name}' is not yours to set: ")


@needs_megatron
def test_a_field_that_nobody_has_classified_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    fresh = upstream.Argument("fresh_idea", ast.Name("bool"))
    monkeypatch.setattr(upstream, "megatron_arguments", lambda _name: {"fresh_idea": fresh})
    assert problems("megatron", fresh_idea=True) == [
        "'megatron.fresh_idea' is not open: whether it changes what the model computes has not been decided here"
    ]


@needs_megatron
@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"recompute_num_layers": -1}, "at least 1"),
        ({"recompute_num_layers": 0}, "at least 1"),
        ({"num_layers_in_first_pipeline_stage": 0}, "at least 1"),
        ({"ddp": {"bucket_size": 0}}, "at least 1"),
        ({"recompute_granularity": "selective", "recompute_modules": ["attn"]}, "made of core_attn"),
        ({"moe_token_dispatcher_type": "allgather"}, "one of alltoall, flex"),
        ({"moe_router_dtype": "fp32", "recompute_granularity": "full"}, "recompute_method"),
        (
            {"recompute_granularity": "selective", "recompute_num_layers": 1},
            "'selective' has recompute_modules",
        ),
        ({"recompute_method": "block"}, "without megatron.recompute_granularity"),
    ],
)
def test_values_out_of_their_bounds(values: dict[str, Any], why: str) -> None:
    assert why in problems("megatron", **values)[0]


@needs_megatron
def test_what_goes_together_is_what_upstream_takes() -> None:
    """Every combination of the options of recomputing: refused here where Megatron-core refuses it, and only more."""
    importlib.import_module("polyturn.trainer.megatron")
    from megatron.core.transformer.transformer_config import TransformerConfig

    choices: dict[str, tuple[Any, ...]] = {
        "recompute_granularity": (None, "full", "selective"),
        "recompute_method": (None, "uniform", "block"),
        "recompute_num_layers": (None, 1),
        "recompute_modules": (None, ["core_attn"], ["mlp", "layernorm"]),
        "moe_layer_recompute": (False, True),
    }
    with warnings.catch_warnings(action="ignore"):
        for values in itertools.product(*choices.values()):
            section = dict(zip(choices, values, strict=True))
            try:
                TransformerConfig(
                    num_layers=2, hidden_size=8, num_attention_heads=2, **copy.deepcopy(section)
                )
            except (ValueError, AssertionError):
                assert problems("megatron", **section), section


@needs_sglang
@needs_megatron
def test_reading_imports_neither_package() -> None:
    program = (
        "import sys; from polyturn.configs.loading import upstream;"
        "assert upstream.sglang_arguments() and upstream.megatron_arguments();"
        "assert not {'torch', 'sglang', 'megatron'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@needs_sglang
@needs_megatron
def test_a_recipe_is_told_the_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text(
        "extends: quickstart\nsglang:\n  page_siz: 4\nmegatron:\n  bf16: true\n  ddp:\n    bucket: 4\n",
        "utf-8",
    )
    with pytest.raises(ConfigError) as caught:
        load_config("r.yaml")
    assert str(caught.value).splitlines() == [
        "r.yaml:3: unknown key 'sglang.page_siz', did you mean 'sglang.page_size'?",
        "r.yaml:5: 'megatron.bf16' is not yours to set: set model.dtype",
        "r.yaml:7: unknown key 'megatron.ddp.bucket', did you mean 'megatron.ddp.bucket_size'?",
    ]


def test_a_package_that_is_not_installed_is_not_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream, "sglang_arguments", lambda: None)
    assert problems("sglang", anything=1) == []
    assert problems("sglang", port=1) == ["'sglang.port' is not yours to set: set engines.port"]


@pytest.mark.parametrize(
    ("annotation", "good", "bad"),
    [
        ("int", [1], [True, 1.0, "1", None, [1]]),
        ("float", [1, 1.5], [True, "1"]),
        ("bool", [True], [1, "true"]),
        ("str", ["a", {"json": 1}], [1, True]),
        ("Optional[int]", [None, 1], ["1"]),
        ("int | None", [None, 1], ["1"]),
        ("'int | None'", [None, 1], ["1"]),
        ("Union[str, List[int]]", ["a", [1]], [1]),
        ("Literal['a', 'b']", ["a"], ["c", None]),
        ("Optional[Literal['a']]", ["a", None], ["c"]),
        ("typing.Dict[str, int]", [{}], [[], "a"]),
        ("SomethingElse", [1, "a", None], []),
    ],
)
def test_simple_annotations(annotation: str, good: list[Any], bad: list[Any]) -> None:
    node = ast.parse(annotation, mode="eval").body
    assert [accepts(node, value) for value in good] == [True] * len(good)
    assert [accepts(node, value) for value in bad] == [False] * len(bad)
