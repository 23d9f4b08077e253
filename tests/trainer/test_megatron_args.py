"""Megatron-LM's arguments, read without running what their pickle names, and against a model's config."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from polyturn.configs.models import preset_directory, read_json
from polyturn.trainer.checkpoints.megatron_args import COMMON, check_args, read_args


class Runs:
    """A pickle of it makes a directory when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (os.mkdir, (str(self.path),))


def write(directory: Path, **args: Any) -> Path:
    torch.save({"args": argparse.Namespace(**args), "iteration": 10}, directory / COMMON)
    return directory


def test_nothing_that_the_arguments_name_is_made_or_run(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    write(tmp_path, num_layers=3, attack=Runs(ran), dtype=torch.bfloat16, tensor=torch.ones(2), save=tmp_path)
    assert read_args(tmp_path) == {"num_layers": 3}
    assert not ran.exists()
    assert read_args(tmp_path / "nowhere") is None


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04"])
def test_a_damaged_file_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / COMMON).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{COMMON} is damaged"):
        read_args(tmp_path)


@pytest.mark.parametrize(
    ("name", "args", "told"),
    [
        ("qwen3-4b", {"num_layers": 36, "rotary_base": 1000000, "norm_epsilon": 1e-6}, None),
        ("qwen3-4b", {"qk_layernorm": True, "rotary_interleaved": False, "kv_channels": 128}, None),
        ("qwen3-4b", {"rotary_base": 10000}, "--rotary-base 10000, and .* says 1000000"),
        ("qwen3-4b", {"qk_layernorm": False}, "--qk-layernorm False"),
        ("qwen3-4b", {"rotary_interleaved": True}, "--rotary-interleaved True"),
        ("qwen3-4b", {"untie_embeddings_and_output_weights": True}, "output layer of its own"),
        ("qwen3-4b", {"rotary_base": None, "moe_router_topk": 2}, None),
        ("qwen3-30b-a3b", {"moe_router_topk": 2}, "--moe-router-topk 2"),
        ("deepseek-v3", {"multi_latent_attention": True, "qk_layernorm": True, "kv_channels": 128}, None),
        ("deepseek-v3", {"moe_router_score_function": "softmax"}, "--moe-router-score-function softmax"),
    ],
)
def test_arguments_are_compared_with_the_models_config(
    tmp_path: Path, name: str, args: dict[str, Any], told: str | None
) -> None:
    hf = read_json(preset_directory(name) / "config.json")
    write(tmp_path, **args)
    if told is None:
        check_args(tmp_path, hf)
        return
    with pytest.raises(ValueError, match=told):
        check_args(tmp_path, hf)
