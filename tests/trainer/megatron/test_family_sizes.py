"""The memory arithmetic's parameter counts against Megatron-core's own, of models built on the meta device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from polyturn.configs.loading.loader import load_config
from polyturn.configs.models import preset_directory, read_json
from polyturn.configs.schema.trainer import ParallelConfig
from polyturn.configs.sizing.memory import stage_parameters
from polyturn.configs.sizing.model_shape import ModelShape, StageSizes
from tests.support.megatron.ranks_pool import RankContext

pytestmark = pytest.mark.stack


def build_parts(
    _context: RankContext, config: dict[str, Any], parallel: ParallelConfig, megatron: dict[str, Any]
) -> dict[int, tuple[int, int]]:
    """(dense parameters, parameters of experts) by rank: of the first and the last rank of every pipeline stage."""
    stage_size = parallel.world_size // parallel.pipeline
    counts = {}
    for stage in range(parallel.pipeline):
        for rank in {stage * stage_size, (stage + 1) * stage_size - 1}:
            counts[rank] = _build_part(rank, config, parallel, megatron)
    return counts


def _build_part(
    rank: int, config: dict[str, Any], parallel: ParallelConfig, megatron: dict[str, Any]
) -> tuple[int, int]:
    import torch.distributed as dist
    from megatron.core.models.gpt.gpt_model import GPTModel
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from polyturn.trainer.megatron.model import build_chunks, read_architecture, transformer_config
    from polyturn.trainer.megatron.process_groups import ModelLayout, form_groups, leave_ranks
    from polyturn.trainer.megatron.weights import locate_tensors

    # It moves the values of tied embeddings between stages, and there are none.
    GPTModel.setup_embeddings_and_output_layer = lambda _model: None
    # Collectives that do nothing: this one process is any rank of any layout.
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=parallel.world_size)
    try:
        form_groups(parallel, rank=rank)
        layout = ModelLayout.current()
        architecture = read_architecture(config, tensor_parallel=layout.tensor)
        with torch.device("meta"):
            chunks = build_chunks(
                transformer_config(config, dtype="bfloat16", device="cpu", extra=megatron, layout=layout),
                architecture,
                device="cpu",
            )
        dense = experts = 0
        for located in locate_tensors(chunks, architecture):
            if isinstance(located.tensor, torch.nn.Parameter):
                assert located.tensor.is_meta, located.name
                if located.mapped.is_expert:
                    experts += located.tensor.numel()
                else:
                    dense += located.tensor.numel()
        return dense, experts
    finally:
        leave_ranks()


def assert_counts(
    rank_pool: Any, config: dict[str, Any], parallel: ParallelConfig, megatron: dict[str, Any]
) -> None:
    sizes = StageSizes(
        first=megatron.get("num_layers_in_first_pipeline_stage"),
        last=megatron.get("num_layers_in_last_pipeline_stage"),
    )
    expected = stage_parameters(ModelShape.of(config, source="config.json"), parallel, sizes)
    (found,) = rank_pool.run(1, build_parts, config, parallel, megatron)
    for rank, counts in found.items():
        stage = expected[parallel.place(rank).pipeline]
        assert counts == (stage.dense, stage.experts), f"rank {rank}"


@pytest.mark.parametrize(
    "preset",
    ["qwen3-4b", "glm-4-9b", "qwen3-30b-a3b", "glm-4.5-355b", "deepseek-v3", "kimi-k2", "moonlight-16b-a3b"],
)
def test_presets_in_their_layouts(rank_pool, tmp_path: Path, preset: str):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"extends: [search_r1, 'preset:{preset}']\nname: big\n", encoding="utf-8")
    config = load_config(recipe, ["environment.options.questions=q.jsonl"])
    hf = read_json(preset_directory(preset) / "config.json")
    fields = {key: value for key, value in config.megatron.items() if key != "optimizer"}
    assert_counts(rank_pool, hf, config.trainer.parallel, fields)


@pytest.mark.parametrize(
    ("preset", "layout"),
    [
        ("llama-3.2-1b", {"pipeline": 3}),
        ("qwen2.5-7b", {"tensor": 4, "pipeline": 2, "virtual_pipeline": 7}),
        ("glm-4.5-air", {"tensor": 2, "pipeline": 4, "expert": 8, "expert_tensor": 2, "data": 8}),
    ],
)
def test_other_layouts(rank_pool, preset: str, layout: dict[str, Any]):
    hf = read_json(preset_directory(preset) / "config.json")
    assert_counts(rank_pool, hf, ParallelConfig(**layout), {})
