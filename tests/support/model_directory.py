"""A model directory that passes the checks before a start, and holds next to nothing."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

from tokenizers import pre_tokenizers

from polyturn.configs.sizing.model_shape import ModelShape
from polyturn.trainer.base_model.initial import CHAT_TEMPLATE_PATH
from polyturn.trainer.models.weight_files import expected_tensors

SHAPE: dict[str, Any] = {
    "model_type": "qwen3",
    "vocab_size": 260,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
}


def write_model(directory: Path, *, num_tokens: int = 260, **changes: Any) -> Path:
    """The files that preflight reads: shape, tokenizer, chat template and a safetensors file of zeros."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(SHAPE | changes))
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    others = [f"t{index}" for index in range(num_tokens - 1 - len(letters))]
    vocabulary = {text: index for index, text in enumerate([*letters, *others])}
    added = [{"id": num_tokens - 1, "content": "<|im_end|>", "special": True}]
    by_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    tokenizer = {
        "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
        "added_tokens": added,
        "pre_tokenizer": by_bytes,
        "decoder": by_bytes,
    }
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE_PATH.read_text(encoding="utf-8"))
    write_zeros(directory / "model.safetensors", SHAPE | changes | {"model_type": SHAPE["model_type"]})
    return directory


def write_zeros(path: Path, config: dict[str, Any]) -> None:
    """The weights of a config.json, all of them 0."""
    header: dict[str, Any] = {}
    end = 0
    for name, shape in expected_tensors(ModelShape.of(config, source="config.json")):
        start, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(end))
