"""The parts of checkpoints that need no ranks: boxes, files with checksums, telling directories apart."""

from __future__ import annotations

import itertools
import json
import math
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from polyturn.configs.models import preset_directory, read_json
from polyturn.configs.schema.run import RunConfig
from polyturn.configs.schema.trainer import LoraConfig
from polyturn.trainer.checkpoints.manifest import (
    check_header,
    checksum,
    describe_adapters,
    describe_file,
    describe_folders,
    describe_model,
    find_faults,
    read_manifest,
    write_manifest,
    write_sealed,
)
from polyturn.trainer.checkpoints.sources import find_source, initial_weights
from polyturn.trainer.megatron.checkpoint_state import Box, copy_shared, slabs
from polyturn.trainer.megatron.checkpoints import write_safetensors
from polyturn.trainer.run.preflight import preflight


def cut(size: int, parts: list[float]) -> list[tuple[int, int]]:
    """A dimension or a range divided at some fractions: (start, end) of each part, none of them empty."""
    points = sorted({0, size, *(int(part * size) for part in parts)})
    return list(itertools.pairwise(points))


def shares(
    shape: tuple[int, ...], cuts: list[list[float]], ranges: list[float]
) -> list[tuple[Box, int, int]]:
    """A tensor divided into a grid of boxes, and each box into ranges of its elements: what ranks hold."""
    boxes: list[tuple[tuple[int, ...], tuple[int, ...]]] = [((), ())]
    for size, parts in zip(shape, cuts, strict=True):
        boxes = [
            ((*offset, start), (*part, end - start))
            for offset, part in boxes
            for start, end in cut(size, parts)
        ]
    found = []
    for offset, part in boxes:
        box = Box(
            key="w", global_shape=shape, offset=offset, shape=part, flat_start=0, padded=False, main=True
        )
        found += [(box, start, end) for start, end in cut(math.prod(part), ranges)]
    return found


fractions = st.lists(st.floats(0, 1), max_size=2)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=3).flatmap(
        lambda shape: st.tuples(
            st.just(tuple(shape)),
            *(st.lists(fractions, min_size=len(shape), max_size=len(shape)) for _ in range(2)),
            fractions,
            fractions,
        )
    )
)
def test_what_one_layout_holds_fills_any_other(case: Any) -> None:
    shape, cuts, other_cuts, ranges, other_ranges = case
    whole = torch.arange(math.prod(shape), dtype=torch.float32).view(shape)

    def flat(box: Box, start: int, end: int) -> torch.Tensor:
        window = tuple(slice(o, o + n) for o, n in zip(box.offset, box.shape, strict=True))
        return whole[window].reshape(-1)[start:end].clone()

    written = [(box, start, end, flat(box, start, end)) for box, start, end in shares(shape, cuts, ranges)]
    for box, start, end in shares(shape, other_cuts, other_ranges):
        target = torch.full((end - start,), -1.0)
        num_copied = 0
        for ours in slabs(box, start, end):
            for their_box, their_start, their_end, source in written:
                for theirs in slabs(their_box, their_start, their_end):
                    num_copied += copy_shared(target, ours, source, theirs)
        assert num_copied == end - start
        assert torch.equal(target, flat(box, start, end))


def test_two_boxes_in_one_flat_tensor() -> None:
    """Gate and up projections of one rank of two: rows 2..3 and 6..7 of [8, 3], one after the other."""
    whole = torch.arange(24.0).view(8, 3)
    local = torch.cat([whole[2:4], whole[6:8]]).reshape(-1)
    boxes = [
        Box(
            key="w",
            global_shape=(8, 3),
            offset=(row, 0),
            shape=(2, 3),
            flat_start=start,
            padded=False,
            main=True,
        )
        for row, start in ((2, 0), (6, 6))
    ]
    target = torch.zeros(24)
    (everything,) = slabs(
        Box(key="w", global_shape=(8, 3), offset=(0, 0), shape=(8, 3), flat_start=0, padded=False, main=True),
        0,
        24,
    )
    for box in boxes:
        for theirs in slabs(box, 4, 9):
            copy_shared(target, everything, local[4:9], theirs)
    expected = torch.zeros(24)
    expected[[10, 11, 18, 19, 20]] = torch.tensor([10.0, 11, 18, 19, 20])
    assert torch.equal(target, expected)


def test_a_streamed_file_is_what_safetensors_reads_and_its_checksum_that_of_its_bytes(tmp_path: Path) -> None:
    tensors = {
        "bytes": torch.arange(7, dtype=torch.uint8),
        "half": torch.randn(3, 5).bfloat16(),
        "whole": torch.randn(4, 1),
        "count": torch.tensor([2**40]),
        "fp8": torch.randn(9).to(torch.float8_e4m3fn),
        "empty": torch.zeros(0),
    }
    path = tmp_path / "rank.safetensors"
    written = write_safetensors(path, tensors, {"index": "[]"})
    assert written == describe_file(path)
    assert struct.unpack("<Q", path.read_bytes()[:8])[0] % 8 == 0
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"index": "[]"}
        assert set(file.keys()) == set(tensors)
        for name, tensor in tensors.items():
            read = file.get_tensor(name)
            assert read.dtype == tensor.dtype
            assert torch.equal(read.view(torch.uint8), tensor.view(torch.uint8))
    assert [path.name for path in tmp_path.iterdir()] == ["rank.safetensors"]


def test_ranks_look_at_different_files_and_together_at_all(tmp_path: Path) -> None:
    files = []
    for index in range(5):
        path = tmp_path / f"file-{index}"
        path.write_bytes(bytes([index]) * 100)
        files.append(describe_file(path))
    write_manifest(tmp_path, {"num_updates": 3}, files)
    assert read_manifest(tmp_path)[0] == {"num_updates": 3}
    damaged = tmp_path / "file-3"
    damaged.write_bytes(bytes([9]) * 100)
    assert checksum(damaged) != files[3].crc32
    assert find_faults(tmp_path, read=False) == []
    found = [find_faults(tmp_path, share=share, num_shares=2) for share in range(2)]
    assert found == [[], [f"{damaged} is damaged: its checksum does not fit"]]


def test_folders_in_a_checkpoint_are_looked_at_too(tmp_path: Path) -> None:
    reference = tmp_path / "reference" / "model.safetensors"
    reference.parent.mkdir()
    reference.write_bytes(bytes(10))
    own = tmp_path / "critic"
    own.mkdir()
    write_manifest(own, {}, [])
    write_manifest(tmp_path, {}, describe_folders(tmp_path))
    assert [file.name for file in read_manifest(tmp_path)[1]] == ["reference/model.safetensors"]
    reference.write_bytes(bytes(9))
    assert find_faults(tmp_path) == [f"{reference} has 9 bytes, not the 10 that were written"]


def config_of(tmp_path: Path, **changes: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "trial",
            "output_dir": tmp_path / "runs",
            "environment": {"id": "polyturn/TwoHopSearch-v0", "max_tokens_per_episode": 512},
            "model": {"path": "builtin:tiny-searcher", "dtype": "float32", **changes.pop("model", {})},
            "rollout": {"prompts_per_step": 2, "samples_per_prompt": 2},
            "trainer": {"num_steps": 1, "global_batch_size": 4, "device": "cpu"},
            "engines": {"device": "cpu"},
            **changes,
        }
    )


def test_what_a_run_begins_with(tmp_path: Path) -> None:
    empty, reference = tmp_path / "empty", tmp_path / "reference"
    empty.mkdir()
    reference.mkdir()
    (reference / "config.json").write_text("{}")
    assert initial_weights(config_of(tmp_path)) is None
    assert initial_weights(config_of(tmp_path, model={"reference_path": str(reference)})) is None
    assert initial_weights(config_of(tmp_path, checkpoint={"load": empty})) is None
    fallen_back = config_of(tmp_path, checkpoint={"load": empty}, model={"reference_path": str(reference)})
    assert initial_weights(fallen_back) == reference
    assert initial_weights(config_of(tmp_path, checkpoint={"load": reference})) == reference
    with pytest.raises(ValueError, match="is no directory"):
        initial_weights(config_of(tmp_path, checkpoint={"load": tmp_path / "typo"}))
    with pytest.raises(ValueError, match=r"checkpoint\.load: .*typo is no directory"):
        preflight(config_of(tmp_path, checkpoint={"load": tmp_path / "typo"}))


def test_directories_are_told_apart(tmp_path: Path) -> None:
    torch_dist = tmp_path / "megatron" / "iter_0000012"
    torch_dist.mkdir(parents=True)
    (torch_dist / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist"}))
    (torch_dist.parent / "latest_checkpointed_iteration.txt").write_text("12\n")
    for directory in (torch_dist, torch_dist.parent):
        source = find_source(directory)
        assert source is not None and (source.kind, source.path) == ("torch_dist", torch_dist)
    (torch_dist.parent / "latest_checkpointed_iteration.txt").write_text("13\n")
    with pytest.raises(ValueError, match="names 13"):
        find_source(torch_dist.parent)
    run = tmp_path / "run"
    for step in (1, 2, 3):
        directory = run / "checkpoints" / f"step_{step:06d}"
        directory.mkdir(parents=True)
        if step < 3:
            write_manifest(directory, {}, [])
    source = find_source(run)
    assert source is not None and source.kind == "checkpoint" and source.path.name == "step_000002"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "readme").touch()
    with pytest.raises(ValueError, match="nothing to load"):
        find_source(tmp_path / "other")
    (tmp_path / "other" / "model.gguf").touch()
    with pytest.raises(ValueError, match=r"has its weights as model\.gguf"):
        find_source(tmp_path / "other")


@pytest.mark.parametrize("name", ["../elsewhere", "/etc/passwd", "a/../../b", 3])
def test_a_manifest_names_files_of_its_own_directory_only(tmp_path: Path, name: Any) -> None:
    listed = [{"name": name, "num_bytes": 1, "crc32": 1}]
    write_sealed(tmp_path / "trainer.json", {"format": 2, "header": {}, "files": listed})
    assert find_faults(tmp_path) == [
        f"{tmp_path / 'trainer.json'} names the file {name!r}, which is not in its directory"
    ]


def test_fp8_is_for_gpus(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"weight_sync\.dtype: fp8_block needs engines on GPUs"):
        preflight(config_of(tmp_path, weight_sync={"kind": "broadcast", "dtype": "fp8_block"}))


@pytest.mark.parametrize(
    ("trainer", "checks", "told"),
    [
        ({"lora": None}, {}, "adapter sends LoRA's adapters: set trainer.lora"),
        ({"lora": LoraConfig()}, {"enabled": True}, "set checks.weights_equal=false"),
    ],
)
def test_adapters_alone_need_some_and_cannot_be_summed_up(
    tmp_path: Path, trainer: dict[str, Any], checks: dict[str, Any], told: str
) -> None:
    config = config_of(tmp_path, weight_sync={"kind": "adapter"})
    config = config.model_copy(
        update={
            "trainer": config.trainer.model_copy(update=trainer),
            "checks": config.checks.model_copy(update=checks),
        }
    )
    with pytest.raises(ValueError, match=told):
        preflight(config)


def test_a_checkpoint_of_another_model_or_of_other_adapters_is_refused() -> None:
    layers = ("q_proj", "k_proj", "down_proj")
    hf = read_json(preset_directory("qwen3-4b") / "config.json")
    lora = LoraConfig(rank=8, alpha=16.0)

    def header(config: dict[str, Any], adapters: LoraConfig | None) -> dict[str, Any]:
        described = {**describe_model(config), "adapters": describe_adapters(adapters, layers)}
        kept: dict[str, Any] = json.loads(json.dumps(described))
        return kept

    ours = header(hf, lora)
    # All layers that can have adapters, named or not; and headers of before that say less.
    everywhere = LoraConfig(rank=8, alpha=16.0, target_modules=layers)
    for sound in (ours, header(hf, everywhere), {"model": ours["model"]}):
        check_header(sound, ours, source=Path("step"))
    for other, told in (
        (header(hf, LoraConfig(rank=8, alpha=32.0)), r"alpha=32\.0, and trainer\.lora has alpha=16\.0"),
        (header(hf, LoraConfig(rank=4, alpha=16.0)), "rank=4, and trainer.lora has rank=8"),
        (
            header(hf, LoraConfig(rank=8, alpha=16.0, target_modules=("q_proj",))),
            r"target_modules=\['q_proj'\], and trainer\.lora has target_modules=\['down_proj', 'k_proj', 'q_proj'\]",
        ),
        (header(hf, None), "without LoRA adapters, and trainer.lora asks for some"),
        (header({**hf, "rope_theta": 7}, lora), r"another model: its rope_base is 7\.0"),
        (header({**hf, "hidden_size": 64}, lora), "another model: its hidden_size is 64"),
    ):
        with pytest.raises(ValueError, match=rf"^step .*{told}"):
            check_header(other, ours, source=Path("step"))
    with pytest.raises(ValueError, match=r"with LoRA adapters, and trainer\.lora asks for none"):
        check_header(ours, header(hf, None), source=Path("step"))
