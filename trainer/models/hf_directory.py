"""Hugging Face model directories: config and safetensors in, and out again, as they are or in block-quantised FP8."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from polyturn.configs.sizing.model_shape import ModelShape
from polyturn.rollout.whole_file import removed_on_failure
from polyturn.trainer.models.fp8 import cast_tensors, dequantize_blocks, round_tensors
from polyturn.trainer.models.quantization import BlockFP8, check_scale, find_quantised, quantization_config
from polyturn.trainer.models.weight_files import (
    CORRECTION,
    FLOATS,
    FP8,
    INDEX_NAME,
    SCALE_SUFFIX,
    SINGLE_NAME,
    StoredTensor,
    is_carried,
    layer_number,
    read_header,
    read_weight_files,
)

MAX_SHARD_BYTES = 5 * 1024**3
LOOKED_AT = 2**24
"""Numbers of a tensor at once."""
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
TEMPLATES_NAME = "additional_chat_templates"
"""The only folder of a model directory that transformers reads."""
CARRIED_NAME = "carried.safetensors"
"""In a torch_dist directory's copy of the small files: tensors that the trainer has no place for."""
_DTYPE_NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "float64": "F64"}


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
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold a JSON object")
    return config


def config_dtype(config: Mapping[str, Any]) -> str:
    """The dtype that a config.json names, or "float32" as transformers takes it."""
    return str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")


class HFWeights(Mapping[str, torch.Tensor]):
    """The tensors of a directory by name, read one at a time, as numbers that can be trained.

    A matrix in block-quantised FP8 is given as the float32 matrix that it and its scales stand for; the scales are no
    tensors of their own.
    """

    def __init__(
        self,
        directory: Path,
        *,
        without: Collection[str] = (),
        stored: Mapping[str, StoredTensor] | None = None,
    ) -> None:
        """Open the directory's safetensors; close them with `close`.

        Args:
            without: tensors to leave out.
            stored: other tensors than those of the directory's own index.

        Raises:
            ValueError: a file is missing or damaged.
        """
        self.directory = directory
        self.without = without
        self.stored = read_weight_files(directory) if stored is None else stored
        self._stack = ExitStack()
        self._opened: dict[Path, Any] = {}
        self._fp8 = _stored_fp8(directory)
        scales = {f"{name}{SCALE_SUFFIX}" for name, tensor in self.stored.items() if tensor.dtype == FP8}
        self._names = [name for name in self.stored if name not in without and name not in scales]

    def __getitem__(self, name: str) -> torch.Tensor:
        """One tensor.

        Raises:
            ValueError: it is quantised in a way that is not read, or a number of it is not finite.
        """
        stored = self.stored[name]
        if stored.dtype not in (*FLOATS, FP8):
            raise ValueError(
                f"{stored.path}: {name} has the dtype {stored.dtype}, which holds no weights to train: "
                "use the model in bfloat16"
            )
        tensor = self._read(name) if stored.dtype in FLOATS else self._dequantize(name)
        if wrong := _num_not_finite(tensor):
            raise ValueError(f"{stored.path}: {name} has {wrong} numbers that are not finite")
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor, from the files' headers alone."""
        return {name: self.stored[name].shape for name in self}

    def close(self) -> None:
        self._stack.close()

    def _read(self, name: str) -> torch.Tensor:
        path = self.stored[name].path
        if path not in self._opened:
            try:
                self._opened[path] = self._stack.enter_context(safe_open(path, framework="pt"))
            except SafetensorError as error:
                raise ValueError(f"{path} is damaged: {error}") from error
        tensor: torch.Tensor = self._opened[path].get_tensor(name)
        return tensor

    def _dequantize(self, name: str) -> torch.Tensor:
        check_scale(name, self.stored, self._fp8)
        scales = self._read(f"{name}{SCALE_SUFFIX}")
        return dequantize_blocks(self._read(name), scales, block=self._fp8.block)


def _num_not_finite(tensor: torch.Tensor) -> int:
    """Part by part: to look at a tensor takes as much memory again as what is looked at."""
    parts = tensor.reshape(-1).split(LOOKED_AT)
    return sum(int((~torch.isfinite(part)).sum()) for part in parts)


def _stored_fp8(directory: Path) -> BlockFP8:
    """As the config.json says, if there is one."""
    config = read_config(directory) if (directory / "config.json").is_file() else {}
    return BlockFP8.of(config, source=directory) or BlockFP8()


def write_hf_directory(
    directory: Path,
    *,
    source: Path,
    tensors: Iterable[tuple[str, torch.Tensor]],
    dtype: str,
    config_changes: Mapping[str, Any] | None = None,
) -> None:
    """Write a model directory like `source` with these weights: its config, tokenizer and every other small file, and
    the tensors of it that the trainer has no place for (`carried_tensors`).

    The directory appears whole or not at all; one that is there already is replaced.

    Args:
        config_changes: keys of config.json to add or replace, or with None to remove.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    with removed_on_failure(directory.with_name(f"{directory.name}.{uuid4().hex[:8]}.part")) as part:
        copy_small_files(source, part)
        names = _write_shards(part, _with_carried(tensors, source, dtype))
        changes = {**_unclaimed_layers(read_config(part), names), **(config_changes or {})}
        describe_weights(part, dtype=dtype, changes=changes)
        _put_in_place(part, directory)


def _put_in_place(part: Path, directory: Path) -> None:
    """Rename a finished directory to what it replaces."""
    if not directory.exists():
        part.rename(directory)
        return
    old = directory.with_name(f"{directory.name}.{uuid4().hex[:8]}.old")
    directory.rename(old)
    part.rename(directory)
    shutil.rmtree(old)


def copy_small_files(source: Path, target: Path) -> None:
    """Everything of a model directory but its weights: config, tokenizer, templates."""
    for path in _small_files(source):
        copy = target / path.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        # Not its permissions: a read-only source must give a directory that can be replaced.
        shutil.copyfile(path, copy)


def files_left_out(source: Path) -> list[str]:
    """What of a model directory a copy of it does not have, beside weights that were read."""
    kept = {path.relative_to(source).parts[0] for path in _small_files(source)}
    read = {stored.path.name for stored in read_weight_files(source).values()}
    read |= {INDEX_NAME, CARRIED_NAME}
    return sorted(
        path.name for path in source.iterdir() if path.name not in kept | read and path.name[0] != "."
    )


def _small_files(source: Path) -> list[Path]:
    paths = [*source.iterdir(), *(source / TEMPLATES_NAME).glob("*")]
    return sorted(
        path for path in paths if path.is_file() and not path.name.endswith((*WEIGHT_SUFFIXES, ".index.json"))
    )


def carried_tensors(source: Path, dtype: str) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a model directory that a model in the trainer does not hold, as `is_carried` tells them.

    What has the dtype that config.json names is given in `dtype`; what has one of its own keeps it, and so do the
    corrections of routers.

    Args:
        source: a Hugging Face directory, or a torch_dist directory's copy of the small files.
    """
    config = read_config(source)
    shape = ModelShape.of(config, source=str(source / "config.json"))
    named = _DTYPE_NAMES.get(config_dtype(config))
    if (source / CARRIED_NAME).is_file():
        stored = read_header(source / CARRIED_NAME)
    elif (source / INDEX_NAME).is_file() or (source / SINGLE_NAME).is_file():
        stored = read_weight_files(source)
    else:
        return
    with closing(HFWeights(source, stored=stored)) as weights:
        for name in weights:
            if is_carried(name, shape):
                follows = stored[name].dtype in (named, FP8) and not name.endswith(CORRECTION)
                yield name, weights[name].to(getattr(torch, dtype)) if follows else weights[name]


def write_carried(directory: Path, *, source: Path, dtype: str) -> None:
    """Leave `carried_tensors` in a copy of the small files, if there are any."""
    tensors = {name: tensor.contiguous() for name, tensor in carried_tensors(source, dtype)}
    if tensors:
        save_file(tensors, directory / CARRIED_NAME, metadata={"format": "pt"})


def _with_carried(
    tensors: Iterable[tuple[str, torch.Tensor]], source: Path, dtype: str
) -> Iterator[tuple[str, torch.Tensor]]:
    given = set()
    for name, tensor in tensors:
        given.add(name)
        yield name, tensor
    yield from ((name, tensor) for name, tensor in carried_tensors(source, dtype) if name not in given)


def _unclaimed_layers(config: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """A change to a config.json that speaks of layers beyond the model's own which are not there."""
    last = max((layer_number(name) or 0 for name in names), default=0)
    claims = bool(config.get("num_nextn_predict_layers"))
    return {"num_nextn_predict_layers": 0} if claims and last < config["num_hidden_layers"] else {}


def describe_weights(directory: Path, *, dtype: str, changes: Mapping[str, Any] | None = None) -> None:
    """Make a directory's config.json say of its weights what they are: that dtype, and not quantised.

    It stays byte for byte where it says so already.

    Args:
        changes: further keys to add or replace, or with None to remove.
    """
    config = read_config(directory)
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    wanted = {"quantization_config": None, key: dtype, **(changes or {})}
    if all(config.get(name) == value for name, value in wanted.items()):
        return
    removed = {name for name, value in wanted.items() if value is None}
    kept = {name: value for name, value in {**config, **wanted}.items() if name not in removed}
    (directory / "config.json").write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")


def _write_shards(directory: Path, tensors: Iterable[tuple[str, torch.Tensor]]) -> list[str]:
    """Write the tensors; their names."""
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
        _write_shard(directory / SINGLE_NAME, shards[0])
        return list(shards[0])
    _write_shard(directory / f"shard-{len(shards)}.safetensors", shards[-1])
    weight_map = {}
    for i, shard in enumerate(shards, start=1):
        name = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        (directory / f"shard-{i}.safetensors").rename(directory / name)
        weight_map.update(dict.fromkeys(shard, name))
    index = {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}
    (directory / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return list(weight_map)


def _write_shard(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{path} could not be written: {error}") from error
    with path.open("rb") as file:
        os.fsync(file.fileno())


class FP8Cast:
    """How one model is cast: the same at every weight sync as in the directory that its engines were started from."""

    def __init__(self, source: Path) -> None:
        """Read names and shapes, no weights. What is stored in FP8 already is cast as it is stored.

        Raises:
            ValueError: no Hugging Face directory, or one that is quantised in another way.
        """
        self.source = source
        config = read_config(source)
        self._dtype = config_dtype(config)
        stored = BlockFP8.of(config, source=source)
        self.is_stored = stored is not None
        self._fp8 = stored or BlockFP8()
        with closing(HFWeights(source)) as weights:
            self._shapes = weights.shapes()
            in_fp8 = frozenset(name for name in weights if weights.stored[name].dtype == FP8)
        self._quantised = in_fp8 if self.is_stored else find_quantised(self._shapes)

    def __call__(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors as FP8 engines take them."""
        return cast_tensors(tensors, self._quantised, self._fp8)

    def rounded(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors with what the cast costs, for engines that serve their own dtypes."""
        return round_tensors(tensors, self._quantised, self._fp8)

    def write(self, target: Path) -> None:
        """The whole directory in FP8. Raises `ValueError` where it is that already."""
        if self.is_stored:
            raise ValueError(f"{self.source} is quantised already")
        changes = {"quantization_config": quantization_config(self._shapes, self._quantised)}
        with closing(HFWeights(self.source)) as weights:
            write_hf_directory(
                target,
                source=self.source,
                tensors=self(weights.items()),
                dtype=self._dtype,
                config_changes=changes,
            )


def write_unquantised(source: Path, target: Path, *, dtype: str) -> None:
    """A directory in FP8 as one in `dtype`; corrections of routers stay as they are."""
    kept = getattr(torch, dtype)
    with closing(HFWeights(source)) as weights:
        tensors = (
            (name, tensor if name.endswith(CORRECTION) else tensor.to(kept))
            for name, tensor in weights.items()
        )
        write_hf_directory(target, source=source, tensors=tensors, dtype=dtype)
