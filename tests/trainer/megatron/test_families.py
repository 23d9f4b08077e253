"""Every model family in Megatron-core against transformers, on one rank and sharded."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from polyturn.configs.schema.trainer import ParallelConfig
from tests.support.megatron.ranks_pool import RankContext
from tests.support.megatron.tiny_families import (
    HAS_EXPERTS,
    TINY,
    load_model,
    make_tiny,
    run_rank,
    run_without,
)

pytestmark = pytest.mark.stack

TOLERANCE = 2e-6
"""Relative to the largest logit."""


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            made[name] = make_tiny(name, tmp_path_factory.mktemp(name))
        return made[name]

    return make


@pytest.mark.parametrize(
    "layout",
    [
        {},
        {"tensor": 2},
        {"pipeline": 2},
        {"expert": 2, "data": 2},
        {"tensor": 2, "expert": 2, "pipeline": 2},
        {"tensor": 2, "expert_tensor": 2, "data": 2},
        {"pipeline": 2, "virtual_pipeline": 2, "expert": 2, "data": 2},
    ],
    ids=lambda layout: "-".join(f"{axis}{size}" for axis, size in layout.items()) or "one",
)
def test_logits_are_those_of_transformers(rank_pool, tiny, layout: dict[str, Any]):
    names = HAS_EXPERTS if "expert" in layout or "expert_tensor" in layout else TINY
    parallel = ParallelConfig(**layout)
    directories = {name: tiny(name) for name in names}
    ranks = rank_pool.run(parallel.world_size, run_rank, directories, parallel)
    for name, directory in directories.items():
        expected = torch.load(directory / "logits.pt")
        all_logits = [rank[name]["logits"] for rank in ranks if rank[name]["logits"] is not None]
        assert all_logits
        for logits in all_logits:
            error = (logits - expected).abs().max() / expected.abs().max()
            assert error <= TOLERANCE, f"{name}: {error}"
        assert all(rank[name]["names"] == ranks[0][name]["names"] for rank in ranks), "one order on all ranks"


WITHOUT: list[tuple[str, str, dict[str, Any]]] = [
    ("glm4", "glm4", {"rotary_interleaved": False}),
    ("ernie4_5", "ernie4_5", {"rotary_interleaved": False}),
    ("smollm3", "smollm3", {"no_rope_freq": None}),
    ("glm4_moe", "glm4_moe", {"moe_router_topk_scaling_factor": 1.0}),
    ("qwen3_moe-sparse", "qwen3_moe", {"moe_router_pre_softmax": False}),
    ("deepseek_v3", "deepseek_v3", {"moe_router_num_groups": None, "moe_router_group_topk": None}),
    ("deepseek_v3", "deepseek_v3", {"mscale_all_dim": 0.0}),
    ("deepseek_v3", "deepseek_v3", {"beta_fast": 1.0}),
    ("deepseek_v3", "deepseek_v3", {"rope_type": "rope", "rotary_scaling_factor": 1.0}),
]


def test_the_tiny_models_show_what_sets_their_families_apart(rank_pool, tiny):
    directories = {name: tiny(name) for name, _, _ in WITHOUT}
    (errors,) = rank_pool.run(1, run_without, directories, WITHOUT, ParallelConfig())
    for (name, _, fields), error in zip(WITHOUT, errors, strict=True):
        assert error > 100 * TOLERANCE, f"{name} without {fields}: {error}"


def load_rank(context: RankContext, directory: Path, parallel: Any) -> str:
    """What a rank says of a directory that it loads."""
    with context.joined(parallel):
        try:
            load_model(directory)
        except ValueError as error:
            return str(error)
    return "loaded"


def with_tensors(source: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    shutil.copytree(source, target)
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors")
    return target


@pytest.mark.parametrize("layout", [{"pipeline": 2}, {"expert": 2, "data": 2}], ids=["stages", "experts"])
def test_all_ranks_learn_of_a_tensor_that_one_of_them_misses(rank_pool, tiny, tmp_path: Path, layout):
    last = "model.layers.3.mlp.experts.7.down_proj.weight"
    parallel = ParallelConfig(**layout)
    path = with_tensors(tiny("glm4_moe"), tmp_path / "less", lambda tensors: tensors.pop(last))
    told = f"{path} has no {last}, which its config.json calls for"
    assert rank_pool.run(2, load_rank, path, parallel) == [told] * 2
    path = with_tensors(
        tiny("glm4_moe"), tmp_path / "nan", lambda tensors: tensors[last][1].fill_(float("nan"))
    )
    told = f"{path / 'model.safetensors'}: {last} has 24 numbers that are not finite"
    assert rank_pool.run(2, load_rank, path, parallel) == [told] * 2


def test_tensors_that_hold_no_weights_are_named(rank_pool, tiny, tmp_path: Path):
    name = "model.layers.0.self_attn.o_proj.weight"
    for dtype, told in (
        (torch.int8, f"{name} has the dtype I8, which holds no weights to train"),
        (torch.float8_e4m3fn, f"{name} has the dtype F8_E4M3, and there is no {name}_scale_inv"),
        (torch.float8_e5m2, f"{name} has the dtype F8_E5M2, which holds no weights to train"),
    ):
        path = with_tensors(
            tiny("qwen3"),
            tmp_path / str(dtype),
            lambda tensors, dtype=dtype: tensors.update({name: tensors[name].to(dtype)}),
        )
        (found,) = rank_pool.run(1, load_rank, path, ParallelConfig())
        assert told in found


def test_an_output_layer_beside_tied_embeddings_must_be_these(rank_pool, tiny, tmp_path: Path):
    embedding, output = "model.embed_tokens.weight", "lm_head.weight"
    for number, offset in enumerate((0, 1)):
        path = with_tensors(
            tiny("qwen3"),
            tmp_path / str(number),
            lambda tensors, offset=offset: tensors.update({output: tensors[embedding] + offset}),
        )
        (found,) = rank_pool.run(1, load_rank, path, ParallelConfig())
        assert found == "loaded" if offset == 0 else "tie_word_embeddings=true" in found
