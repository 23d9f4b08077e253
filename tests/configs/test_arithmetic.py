"""Batch arithmetic, placement and the memory estimate, against the true sizes of a model."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from polyturn.configs.arithmetic import check_batch, estimate_memory, num_gpus, placement
from polyturn.configs.errors import ConfigError
from polyturn.configs.loader import load_config
from polyturn.configs.models import ModelShape

BATCH = ["rollout.prompts_per_step=6", "rollout.samples_per_prompt=4"]


def shape(**changes: Any) -> ModelShape:
    sizes: dict[str, Any] = {
        "model_type": "qwen3",
        "vocab_size": 100,
        "hidden_size": 32,
        "num_layers": 3,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 16,
        "ffn_size": 48,
        "max_positions": 128,
        "tied_embeddings": True,
    }
    return ModelShape(**(sizes | changes))


@pytest.mark.parametrize(("batch", "updates"), [(24, 1), (12, 2), (8, 3)])
def test_a_batch_that_adds_up(batch: int, updates: int) -> None:
    overrides = [*BATCH, f"trainer.global_batch_size={batch}", f"trainer.updates_per_step={updates}"]
    assert check_batch(load_config("quickstart", overrides)) == (
        f"6 prompts x 4 samples = 24 episodes a step = {batch} global batch x {updates} update(s)"
    )


@pytest.mark.parametrize(
    ("updates", "fix"),
    [(2, "trainer.global_batch_size=12"), (5, "trainer.global_batch_size=24 trainer.updates_per_step=1")],
)
def test_a_batch_that_does_not_shows_both_sides_and_a_fix_that_works(updates: int, fix: str) -> None:
    overrides = [*BATCH, "trainer.global_batch_size=7", f"trainer.updates_per_step={updates}"]
    with pytest.raises(ConfigError) as caught:
        check_batch(load_config("quickstart", overrides))
    assert f"but 6 x 4 = 24 and 7 x {updates} = {7 * updates}; for example set {fix}" in str(caught.value)
    check_batch(load_config("quickstart", [*overrides, *fix.split()]))


def test_groups_of_one_and_empty_ranks_are_refused() -> None:
    one = ["rollout.samples_per_prompt=1", "rollout.prompts_per_step=4", "trainer.global_batch_size=4"]
    with pytest.raises(ConfigError, match="a group of one episode has no baseline"):
        check_batch(load_config("quickstart", one))
    few = ["rollout.samples_per_prompt=2", "rollout.prompts_per_step=1", "trainer.global_batch_size=2"]
    with pytest.raises(ConfigError, match=r"trainer.parallel.data=4 ranks"):
        check_batch(load_config("quickstart", [*few, "trainer.parallel.data=4"]))


def test_placement_numbers_ranks_with_the_tensor_axis_fastest() -> None:
    overrides = ["trainer.parallel={tensor: 2, data: 2}", "engines.num_engines=2", "engines.port=30000"]
    rows = placement(load_config("quickstart", overrides))
    assert [row.name for row in rows if "rank" not in row.name] == ["router", "engine 0", "engine 1"]
    assert [row.note.split(", 1 thread")[0] for row in rows if "rank" in row.name] == [
        "tensor 0, data 0",
        "tensor 1, data 0",
        "tensor 0, data 1",
        "tensor 1, data 1",
    ]
    assert "port 30001" in rows[2].note
    config = load_config("quickstart", [*overrides, "trainer.device=cuda", "engines.device=cuda"])
    assert num_gpus(config) == 2 + 4


@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama"])
@pytest.mark.parametrize("tied", [True, False])
def test_parameter_count_is_the_one_of_the_safetensors_file(family: str, tied: bool, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    settings = {
        "vocab_size": 101,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": tied,
    }
    if family == "qwen3":
        settings["head_dim"] = 16
    config = transformers.AutoConfig.for_model(family, **settings)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    raw = (tmp_path / "model.safetensors").read_bytes()
    header = json.loads(raw[8 : 8 + struct.unpack("<Q", raw[:8])[0]])
    counts = []
    for name, tensor in header.items():
        if name != "__metadata__":
            count = 1
            for length in tensor["shape"]:
                count *= length
            counts.append(count)
    assert ModelShape.read(tmp_path).num_parameters == sum(counts)


def test_tensor_parallel_ranks_together_hold_the_model_and_the_repeated_norms() -> None:
    model = shape()
    norms = 3 * (2 * 32 + 2 * 16) + 32
    assert 2 * model.parameters_per_rank(tensor_parallel=2) == model.num_parameters + norms
    padding = 32 * 2
    assert 3 * shape(num_heads=6, num_kv_heads=3).parameters_per_rank(tensor_parallel=3) == (
        shape(num_heads=6, num_kv_heads=3).num_parameters + 2 * norms + padding
    )


def test_memory_by_hand() -> None:
    model = shape()
    count = model.num_parameters
    options = [
        "trainer.max_tokens_per_gpu=1000",
        "trainer.parallel.data=2",
        "sglang.max_total_tokens=500",
    ]
    estimate = estimate_memory(load_config("quickstart", options), model)
    assert estimate.rank == {
        "weights": 4 * count,
        "gradients": 4 * count,
        "optimizer": 4 * count,
        "logits": 8 * 1000 * 100,
    }
    assert estimate.engine == {"weights": 4 * count, "kv cache": 500 * 2 * 3 * 2 * 16 * 4}
    bf16 = [*options, "model.dtype=bfloat16", "trainer.algorithm.kl.kind=in_loss"]
    estimate = estimate_memory(load_config("quickstart", bf16), model)
    assert estimate.rank["optimizer"] == 6 * count
    assert estimate.rank["reference"] == estimate.rank["weights"] == 2 * count
    assert estimate.engine["kv cache"] == 500 * 2 * 3 * 2 * 16 * 2
