"""The free sections are checked against the installed packages, without importing them."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from polyturn.configs import upstream
from polyturn.configs.annotations import accepts
from polyturn.configs.errors import ConfigError
from polyturn.configs.loader import load_config
from polyturn.configs.megatron_options import DTYPES, GROUPS
from polyturn.trainer.megatron.cpu import install_cpu_compatibility

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
        "quantization": None,
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
def test_every_owned_server_argument_exists_upstream() -> None:
    known = upstream.sglang_arguments()
    assert known is not None
    fields = {argument.field for argument in known.values()}
    assert set(upstream.OWNED_SGLANG) | set(upstream.OWNED_SGLANG_ON_CPU) <= fields


@needs_megatron
def test_megatron_fields() -> None:
    assert problems("megatron", recompute_num_layer=1) == [
        "unknown key 'megatron.recompute_num_layer', did you mean 'megatron.recompute_num_layers'?"
    ]
    assert problems("megatron", recompute_granularity="all") == [
        "'megatron.recompute_granularity' must be one of 'full', 'selective', got 'all'"
    ]
    assert problems("megatron", num_layers=3) == [
        "'megatron.num_layers' is not yours to set: it comes from the model's config.json"
    ]
    assert problems("megatron", deterministic_mode=True, recompute_granularity="full") == []


@needs_megatron
def test_megatron_fields_read_from_source_are_those_of_the_class() -> None:
    # Imported too early, megatron.core would spoil this process for every later test.
    install_cpu_compatibility("cpu")
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig
    from megatron.core.transformer.transformer_config import TransformerConfig

    classes = (TransformerConfig, DistributedDataParallelConfig, OptimizerConfig)
    for group, config_class in zip(GROUPS, classes, strict=True):
        read = upstream.megatron_arguments(config_class.__name__)
        assert read is not None and group.class_name == config_class.__name__
        true = {field.name for field in dataclasses.fields(config_class) if not field.name.startswith("_")}
        assert set(read) == true
        assert set(group.owned) | set(group.needs_gpu) <= true
        assert not set(group.owned) & set(group.needs_gpu)
        assert {key.removeprefix("optimizer.") for key in DTYPES} <= true or group is not GROUPS[2]


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
    assert problems("megatron", optimizer={"log_num_zeros_in_grad": True}) == []
    wrong = problems("megatron", "cuda", optimizer={"exp_avg_dtype": "int4"})
    assert wrong == [
        "'megatron.optimizer.exp_avg_dtype' cannot be 'int4': it must be one of float32, float16, bfloat16, uint8"
    ]


@needs_megatron
@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"moe_token_dispatcher_type": "flex"}, "DeepEP sends tokens between GPUs"),
        ({"moe_enable_deepep": True}, "DeepEP sends tokens between GPUs"),
        ({"fp8": "e4m3"}, "Transformer Engine"),
        ({"cuda_graph_impl": "local"}, "CUDA graphs"),
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
    assert problems("megatron", masked_softmax_fusion=False, cuda_graph_impl="none", fp8=None) == []


@needs_sglang
@needs_megatron
def test_reading_imports_neither_package() -> None:
    program = (
        "import sys; from polyturn.configs import upstream;"
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
