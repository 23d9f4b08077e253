"""Hugging Face model directories: config and safetensors in, and out again."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from safetensors import safe_open
from safetensors.torch import save_file

MAX_SHARD_BYTES = 5 * 1024**3
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
INDEX_NAME = "model.safetensors.index.json"


def read_config(directory: Path) -> dict[str, Any]:
    """The directory's config.json.

    Raises:
        ValueError: there is none, or it is no JSON object.
    """
    path = directory / "config.json"
    if not path.is_file():
        raise ValueError(f"{directory} is no Hugging Face model directory: it has no config.json")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold a JSON object")
    return config


def config_dtype(config: Mapping[str, Any]) -> str:
    """The dtype that a config.json names, or "float32" as transformers takes it."""
    return str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")


class HFWeights(Mapping[str, torch.Tensor]):
    """The tensors of a directory by name, read one at a time."""

    def __init__(self, directory: Path) -> None:
        """Open the directory's safetensors; close them with `close`.

        Raises:
            ValueError: a file is missing.
        """
        self._stack = ExitStack()
        self._files: dict[str, Any] = {}
        for path in _weight_files(directory):
            file = self._stack.enter_context(safe_open(path, framework="pt"))
            self._files.update(dict.fromkeys(file.keys(), file))

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._files[name].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor, from the files' headers alone."""
        return {name: tuple(file.get_slice(name).get_shape()) for name, file in self._files.items()}

    def close(self) -> None:
        self._stack.close()


def _weight_files(directory: Path) -> list[Path]:
    """The files that the directory's index names, or its only one."""
    index, single = directory / INDEX_NAME, directory / "model.safetensors"
    if index.is_file():
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        paths = [directory / name for name in sorted(names)]
    else:
        paths = [single]
    for path in paths:
        if not path.is_file():
            raise ValueError(f"{directory} holds no {path.name}")
    return paths


def write_hf_directory(
    directory: Path,
    *,
    source: Path,
    tensors: Iterable[tuple[str, torch.Tensor]],
    dtype: str,
    config_changes: Mapping[str, Any] | None = None,
) -> None:
    """Write a model directory like `source` (its config, tokenizer and every other small file) with these weights.

    The directory appears whole or not at all; one that is there already is replaced.

    Args:
        config_changes: keys of config.json to add or replace.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    part = directory.with_name(f"{directory.name}.{uuid4().hex[:8]}.part")
    part.mkdir()
    copy_small_files(source, part)
    _set_dtype(part / "config.json", dtype)
    if config_changes:
        config = read_config(part) | dict(config_changes)
        (part / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    _write_shards(part, tensors)
    if directory.exists():
        old = directory.with_name(f"{directory.name}.{uuid4().hex[:8]}.old")
        directory.rename(old)
        part.rename(directory)
        shutil.rmtree(old)
    else:
        part.rename(directory)


def copy_small_files(source: Path, target: Path) -> None:
    """Everything of a model directory but its weights: config, tokenizer, templates."""
    for path in sorted(source.iterdir()):
        if path.is_file() and not path.name.endswith((*WEIGHT_SUFFIXES, ".index.json")):
            # Not its permissions: a read-only source must give a directory that can be replaced.
            shutil.copyfile(path, target / path.name)


def _set_dtype(path: Path, dtype: str) -> None:
    """Make config.json name the dtype of the weights, and leave it byte for byte where it does already."""
    config = json.loads(path.read_text(encoding="utf-8"))
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    if config.get(key) != dtype:
        config[key] = dtype
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _write_shards(directory: Path, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    shards: list[dict[str, torch.Tensor]] = [{}]
    sizes = [0]
    for name, tensor in tensors:
        num_bytes = tensor.numel() * tensor.element_size()
        if shards[-1] and sizes[-1] + num_bytes > MAX_SHARD_BYTES:
            _write_shard(directory / f"shard-{len(shards)}.safetensors", shards[-1])
            shards[-1] = dict.fromkeys(shards[-1], torch.empty(0))
            shards.append({})
            sizes.append(0)
        shards[-1][name] = tensor.detach().cpu().contiguous()
        sizes[-1] += num_bytes
    if len(shards) == 1:
        _write_shard(directory / "model.safetensors", shards[0])
        return
    _write_shard(directory / f"shard-{len(shards)}.safetensors", shards[-1])
    weight_map = {}
    for i, shard in enumerate(shards, start=1):
        name = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        (directory / f"shard-{i}.safetensors").rename(directory / name)
        weight_map.update(dict.fromkeys(shard, name))
    index = {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}
    (directory / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_shard(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, path, metadata={"format": "pt"})
    with path.open("rb") as file:
        os.fsync(file.fileno())
