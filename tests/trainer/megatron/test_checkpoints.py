"""Checkpoints of the trainer's ranks: bitwise at the layout that wrote them, the same training at any other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from polyturn.configs.schema.trainer import ParallelConfig
from tests.support.megatron.checkpoint_runs import (
    Continued,
    begin_with,
    failing_save,
    load_and_go_on,
    save_and_go_on,
    torch_dist_weights,
    train_and_leave,
)
from tests.support.megatron.ranks_pool import RankFailure, RankPool
from tests.support.megatron.tiny_families import make_tiny

pytestmark = pytest.mark.stack

LENGTHS = [5, 40, 17, 3, 33, 17, 61]

DENSE = [
    {},
    {"tensor": 2},
    {"pipeline": 2, "virtual_pipeline": 2},
    {"data": 2},
    {"context": 2},
    {"tensor": 2, "pipeline": 2},
    {"pipeline": 4},
]
MIXTURE = [
    {},
    {"data": 2, "expert": 2},
    {"tensor": 2, "expert_tensor": 2},
    {"pipeline": 2},
    {"pipeline": 2, "data": 2, "expert": 2},
    {"tensor": 2, "expert": 4, "data": 2},
]
SAVED: list[tuple[str, dict[str, int], list[dict[str, int]], str]] = [
    ("qwen3", {"tensor": 2, "data": 2}, DENSE, "float32"),
    ("qwen3", {"pipeline": 2, "virtual_pipeline": 2}, [{}, {"tensor": 2}], "bfloat16"),
    ("glm4_moe", {"tensor": 2, "expert": 2, "data": 2}, MIXTURE, "float32"),
    ("deepseek_v3", {}, [{"pipeline": 2, "data": 2, "expert": 2}], "float32"),
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            made[family] = make_tiny(family, tmp_path_factory.mktemp(family))
        return made[family]

    return make


def assert_equal(
    ours: dict[str, torch.Tensor] | None, theirs: dict[str, torch.Tensor] | None, what: str
) -> None:
    """Bit for bit."""
    assert ours is not None and theirs is not None and ours.keys() == theirs.keys(), what
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), f"{what}: {name}"


@pytest.mark.catalogue("B45")
@pytest.mark.parametrize(
    ("family", "saved", "loaded", "dtype"), SAVED, ids=[f"{family}-{dtype}" for family, _, _, dtype in SAVED]
)
def test_a_checkpoint_goes_on_at_any_layout(
    rank_pool: RankPool,
    tiny: Callable[[str], Path],
    make_samples: Callable[..., Any],
    tmp_path: Path,
    family: str,
    saved: dict[str, int],
    loaded: list[dict[str, int]],
    dtype: str,
) -> None:
    path, directory = tiny(family), tmp_path / "step"
    samples = make_samples(LENGTHS)
    parallel = ParallelConfig(**saved)
    uninterrupted: Continued = rank_pool.run(
        parallel.world_size, save_and_go_on, path, parallel, samples, directory, dtype
    )[0]
    assert uninterrupted.loaded is not None and uninterrupted.trained is not None
    for layout in [parallel, *(ParallelConfig(**sizes) for sizes in loaded)]:
        resumed = rank_pool.run(layout.world_size, load_and_go_on, path, layout, samples, directory, dtype)[0]
        what = f"{family}: {parallel.describe()} -> {layout.describe()}"
        assert resumed.num_updates == uninterrupted.num_updates == 2, what
        assert_equal(resumed.loaded, uninterrupted.loaded, what)
        if layout == parallel:
            assert resumed.metrics == uninterrupted.metrics, what
            assert_equal(resumed.trained, uninterrupted.trained, what)
            continue
        loose = {"float32": 1e-6, "bfloat16": 2e-2}[dtype]
        for ours, theirs in zip(resumed.metrics, uninterrupted.metrics, strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], abs=loose), what
        if dtype == "float32":
            for name, tensor in uninterrupted.trained.items():
                torch.testing.assert_close(resumed.trained[name], tensor, atol=1e-5, rtol=1e-5)
    if dtype == "bfloat16":
        # What is kept are float32 weights, so a run may go on in float32, too.
        (finer,) = rank_pool.run(1, load_and_go_on, path, ParallelConfig(), samples, directory, "float32")
        rounded = {name: tensor.bfloat16() for name, tensor in finer.loaded.items()}
        assert_equal(rounded, uninterrupted.loaded, "float32")
        assert any(not torch.equal(finer.loaded[name], tensor.float()) for name, tensor in rounded.items())


def test_a_save_that_fails_on_one_rank_is_told_on_all_and_spares_the_one_before(
    rank_pool: RankPool, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    for told, refused in rank_pool.run(2, failing_save, tiny("qwen3"), tmp_path):
        assert "rank 1: IsADirectoryError" in told and "rank 0:" not in told
        assert "no finished trainer checkpoint" in refused


@pytest.mark.parametrize(
    ("kind", "load_optimizer", "steps"), [("step", True, 2), ("step", False, 0), ("hf", True, 0)]
)
def test_a_new_run_begins_with_other_weights_and_its_reference_with_it(
    rank_pool: RankPool,
    tiny: Callable[[str], Path],
    make_samples: Callable[..., Any],
    tmp_path: Path,
    kind: str,
    load_optimizer: bool,
    steps: int,
) -> None:
    path, samples = tiny("qwen3"), make_samples(LENGTHS)
    (trained,) = rank_pool.run(1, train_and_leave, path, samples, tmp_path)
    (begun,) = rank_pool.run(1, begin_with, path, samples, tmp_path / kind, load_optimizer)
    for ours, reference, theirs in zip(begun.logprobs, begun.references, trained, strict=True):
        np.testing.assert_array_equal(ours, theirs)
        np.testing.assert_array_equal(reference, theirs)
    assert begun.num_updates == 0, "its schedule is its own"
    assert begun.num_optimizer_steps == steps


def test_torch_dist_weights_are_the_same_at_any_layout(
    rank_pool: RankPool, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    path, directory = tiny("glm4_moe"), tmp_path / "weights"
    found = None
    for sizes in (
        {"tensor": 2, "expert": 2, "data": 2},
        {"pipeline": 2, "data": 2, "expert": 2},
        {"tensor": 2},
        {},
    ):
        layout = ParallelConfig(**sizes)
        weights = rank_pool.run(layout.world_size, torch_dist_weights, path, layout, directory)[0]
        found = found or weights
        assert_equal(weights, found, layout.describe())


def test_damaged_torch_dist_files_are_refused(
    rank_pool: RankPool, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    path, directory = tiny("qwen3"), tmp_path / "weights"
    rank_pool.run(1, torch_dist_weights, path, ParallelConfig(), directory)
    (file,) = directory.glob("*.distcp")
    whole = file.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 255
    for damaged in (whole[: len(whole) // 2], bytes(flipped)):
        file.write_bytes(damaged)
        with pytest.raises(RankFailure, match="the torch_dist checkpoint cannot be used"):
            rank_pool.run(1, torch_dist_weights, path, ParallelConfig(), directory)
    # Megatron-LM's have no checksums: a file cut short still shows.
    (directory / "checksums.json").unlink()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(RankFailure, match=r"\.distcp: .* cannot be read"):
        rank_pool.run(1, torch_dist_weights, path, ParallelConfig(), directory)
    file.unlink()
    with pytest.raises(RankFailure, match=r"has no \.distcp file"):
        rank_pool.run(1, torch_dist_weights, path, ParallelConfig(), directory)
