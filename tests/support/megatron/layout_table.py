"""The layouts that are tested, and a program that prints how far each is from one rank.

python -m tests.support.megatron.layout_table
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

from polyturn.configs.schema.trainer import ParallelConfig
from tests.support.megatron.layout_runs import Run, make_samples, run_layouts
from tests.support.megatron.ranks_pool import RankPool
from tests.support.megatron.tiny_families import HAS_EXPERTS, make_tiny

DENSE: list[dict[str, int]] = [
    {"tensor": 2},
    {"pipeline": 2},
    {"context": 2},
    {"data": 2},
    {"pipeline": 2, "virtual_pipeline": 2},
    {"tensor": 2, "pipeline": 2},
    {"tensor": 2, "context": 2},
    {"pipeline": 2, "context": 2},
    {"tensor": 2, "data": 2},
    {"context": 2, "data": 2},
    {"pipeline": 2, "virtual_pipeline": 2, "data": 2},
    {"pipeline": 3},
    {"pipeline": 4},
    {"context": 4},
    # More ranks than the model's two key-value heads.
    {"tensor": 4},
]
MIXTURE: list[dict[str, int]] = [
    {"expert": 2, "data": 2},
    {"tensor": 2, "expert_tensor": 2},
    {"tensor": 2, "expert": 2},
    {"context": 2, "expert": 2},
    {"expert": 2, "data": 2, "pipeline": 2},
    {"tensor": 2, "expert": 4, "data": 2},
    {"tensor": 2, "expert": 2, "expert_tensor": 2, "data": 2},
    {"tensor": 2, "data": 2},
]
FAMILIES: list[tuple[str, dict[str, int]]] = [
    ("glm4_moe", {"tensor": 2, "pipeline": 2, "expert": 2}),
    ("glm4_moe", {"context": 2, "expert": 2, "pipeline": 2}),
    ("deepseek_v3", {"tensor": 2, "context": 2, "expert": 4}),
    ("deepseek_v3", {"tensor": 2, "pipeline": 2, "expert": 2}),
    ("glm4", {"tensor": 2, "context": 2}),
]


def name(layout: dict[str, int]) -> str:
    return "-".join(f"{axis}{size}" for axis, size in layout.items())


def make_steady(family: str, directory: Path) -> Path:
    """A tiny model whose updates do not magnify rounding, as they would where routing is steep."""
    return make_tiny(family, directory, initializer_range=0.05 if family in HAS_EXPERTS else 0.1)


def differences(ranks: list[Run], expected: Run) -> dict[str, float]:
    """The largest, absolute; of the gradient norm relative."""
    assert ranks[0].weights is not None and expected.weights is not None
    pairs = list(zip(ranks[0].metrics, expected.metrics, strict=True))
    scored = [
        (getattr(rank, when)[sample_id], getattr(expected, when)[sample_id])
        for rank in ranks
        for when in ("before", "after")
        for sample_id in rank.before
    ]
    return {
        "logprob": max(float(np.abs(ours - theirs).max()) for ours, theirs in scored),
        "loss": max(abs(ours["loss"] - theirs["loss"]) for ours, theirs in pairs),
        "gradient norm": max(abs(ours["grad_norm"] / theirs["grad_norm"] - 1) for ours, theirs in pairs),
        "weight": max(
            float((tensor - expected.weights[key]).abs().max()) for key, tensor in ranks[0].weights.items()
        ),
    }


def print_table() -> None:
    cases = [("qwen3", layout) for layout in DENSE] + [("qwen3_moe", layout) for layout in MIXTURE] + FAMILIES
    pool, samples = RankPool(), make_samples()
    models: dict[str, Path] = {}
    single: dict[str, Run] = {}
    print("| model | layout | ranks | logprob | loss | gradient norm | weight |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        for family, layout in cases:
            if family not in models:
                models[family] = make_steady(family, Path(folder) / family)
                alone = pool.run(1, run_layouts, models[family], [ParallelConfig()], samples, {})
                single[family] = alone[0][0]
            parallel = ParallelConfig(**layout)
            ranks = pool.run(parallel.world_size, run_layouts, models[family], [parallel], samples, {})
            found = differences([rank for (rank,) in ranks], single[family])
            numbers = " | ".join(f"{number:.1e}" for number in found.values())
            print(f"| {family} | {parallel.describe()} | {parallel.world_size} | {numbers} |", flush=True)
    pool.close()


if __name__ == "__main__":
    print_table()
