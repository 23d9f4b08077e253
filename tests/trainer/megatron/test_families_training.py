"""Families whose layers differ from Qwen3's train on several ranks as they do on one; bfloat16 and refusals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from polyturn.configs.schema.trainer import ParallelConfig
from tests.support.megatron.layout_runs import run_layouts
from tests.support.megatron.ranks_pool import RankContext
from tests.support.megatron.tiny_families import HAS_EXPERTS, make_tiny

pytestmark = pytest.mark.stack

LENGTHS = [5, 40, 17, 3, 33]
TOLERANCE = 1e-5
TWO_RANKS = [{"tensor": 2}, {"pipeline": 2}, {"context": 2}]
TWO_RANKS_OF_EXPERTS = [*TWO_RANKS, {"expert": 2, "data": 2}]


@pytest.mark.parametrize("family", ["glm4", "glm4_moe", "deepseek_v3", "moonlight"])
def test_two_ranks_train_as_one(rank_pool, make_samples: Callable[..., Any], tmp_path: Path, family: str):
    # Small weights keep a mixture's updates from magnifying rounding, as they do where routing is steep.
    path = make_tiny(family, tmp_path / family, initializer_range=0.05)
    samples = make_samples(LENGTHS)
    layouts = [
        ParallelConfig(**layout) for layout in (TWO_RANKS_OF_EXPERTS if family in HAS_EXPERTS else TWO_RANKS)
    ]
    ((expected,),) = rank_pool.run(1, run_layouts, path, [ParallelConfig()], samples, {})
    first, second = rank_pool.run(2, run_layouts, path, layouts, samples, {})
    for layout, run, other in zip(layouts, first, second, strict=True):
        where = f"{family} with {layout.describe()}"
        assert run.digest == other.digest, where
        for ours, theirs in zip(run.metrics, expected.metrics, strict=True):
            assert ours == pytest.approx(theirs, rel=TOLERANCE, abs=TOLERANCE), where
            assert theirs["grad_norm"] > 0.01
        assert run.weights is not None and expected.weights is not None
        for name, tensor in run.weights.items():
            torch.testing.assert_close(
                tensor, expected.weights[name], atol=TOLERANCE, rtol=TOLERANCE, msg=f"{where}: {name}"
            )
            moves = "e_score_correction_bias" not in name
            assert moves != torch.equal(tensor, _stored(path)[name]), f"{where}: {name}"


def _stored(path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(path / "model.safetensors")


def export_bfloat16(context: RankContext, path: Path, out: Path) -> dict[str, torch.dtype]:
    from tests.support.megatron.policies import make_policy

    policy = make_policy(path, dtype="bfloat16", place=context.place)
    try:
        policy.save_hf(out)
        return {name: tensor.dtype for name, tensor in policy.named_hf_tensors()}
    finally:
        policy.close()


def test_corrections_of_the_router_stay_float32_in_a_bfloat16_model(rank_pool, tmp_path: Path):
    path = make_tiny("glm4_moe", tmp_path / "tiny")
    (dtypes,) = rank_pool.run(1, export_bfloat16, path, tmp_path / "out")
    stored, written = _stored(path), _stored(tmp_path / "out")
    assert dtypes.keys() == stored.keys() == written.keys()
    for name, tensor in stored.items():
        dtype = torch.float32 if "e_score_correction_bias" in name else torch.bfloat16
        assert dtypes[name] == written[name].dtype == dtype, name
        assert torch.equal(written[name], tensor.to(dtype)), name
