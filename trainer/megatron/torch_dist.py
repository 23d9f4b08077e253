"""A model's weights in Megatron-core's own format, `torch_dist`, at any layout.

Upstream's writer starts a manager process and one process a file, which takes seconds; this one writes the same files
from the rank itself. Weights only: what a run resumes from is the format beside this one.
"""

from __future__ import annotations

import io
import json
import math
import os
import pickle
import re
import uuid
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from megatron.core.models.gpt.gpt_model import GPTModel
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import _save_state_dict

from polyturn.rollout.whole_file import removed_on_failure, sync_directory
from polyturn.trainer.checkpoints.manifest import (
    WrittenFile,
    describe_file,
    find_faults,
    write_manifest,
)
from polyturn.trainer.checkpoints.sources import HF_FOLDER, TORCH_DIST_MARKER
from polyturn.trainer.checkpoints.torch_dist_index import StoredChunk, StoredTensor, read_index
from polyturn.trainer.megatron.checkpoint_state import (
    Box,
    Kept,
    Slab,
    copy_shared,
    kept_weights,
    overlap,
    sharding_metadata,
    slabs,
)
from polyturn.trainer.megatron.process_groups import raise_on_all
from polyturn.trainer.models.hf_directory import copy_small_files, describe_weights, write_carried

CHECKSUMS = "checksums.json"
"""Of every file, where we wrote the directory; Megatron-LM writes none, and damage then shows only in the structure."""
ADAPTERS = "lora."
"""The module of a model that holds LoRA's."""
OPTIMIZERS = ("optimizer.", "chained_")
"""How Megatron-LM's names of an optimizer's state begin."""


class InProcessSave(TorchDistSaveShardedStrategy):
    """Writes what its base class writes, by torch's own writer instead of processes of its own."""

    def save(self, sharded_state_dict: Any, checkpoint_dir: Any) -> None:
        by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(
            sharded_state_dict, self.keep_only_main_replica
        )
        _save_state_dict(
            mcore_to_pyt_state_dict(by_key, False),
            FileSystemWriter(checkpoint_dir, single_file_per_rank=True, thread_count=1, sync_files=True),
            planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
        )


def save_torch_dist(chunks: Sequence[GPTModel], directory: Path, *, hf_directory: Path, dtype: str) -> None:
    """Write the weights; the directory appears whole or not at all. Collective.

    Args:
        hf_directory: its config and tokenizer are copied into `HF_FOLDER`, and what of its weights the model has no
            place for, so that the way back needs nothing else.
        dtype: that of the weights.

    Raises:
        OSError: the directory is there already, and not empty.
        CheckpointException: a rank could not write; raised on all of them.
    """
    names: list[Any] = [f"{directory.name}.{uuid.uuid4().hex[:8]}.part"]
    dist.broadcast_object_list(names, src=0)
    part = directory.with_name(names[0])
    with ExitStack() as stack:
        if dist.get_rank() == 0:
            stack.enter_context(removed_on_failure(part))
        dist.barrier()
        _save(chunks, part, hf_directory=hf_directory, dtype=dtype)
        if dist.get_rank() == 0:
            os.replace(part, directory)
            sync_directory(directory.parent)
    dist.barrier()


def _save(chunks: Sequence[GPTModel], part: Path, *, hf_directory: Path, dtype: str) -> None:
    """Write into a directory that is made. Collective."""
    # What Megatron-LM looks for in `common.pt`.
    state: dict[str, Any] = {"checkpoint_version": 3.0, "iteration": 0}
    for index, chunk in enumerate(chunks):
        name = "model" if len(chunks) == 1 else f"model{index}"
        state[name] = chunk.sharded_state_dict(metadata=sharding_metadata())
    dist_checkpointing.save(state, str(part), InProcessSave("torch_dist", 1))
    files = _describe_files(part)
    if dist.get_rank() == 0:
        write_manifest(part, {}, files, marker=CHECKSUMS)
        (part / HF_FOLDER).mkdir()
        copy_small_files(hf_directory, part / HF_FOLDER)
        write_carried(part / HF_FOLDER, source=hf_directory, dtype=dtype)
        describe_weights(part / HF_FOLDER, dtype=dtype)


def _describe_files(directory: Path) -> list[WrittenFile]:
    """Size and checksum of every file, each taken by some rank."""
    paths = sorted(path for path in directory.iterdir() if path.is_file())
    ours = [describe_file(path) for path in paths[dist.get_rank() :: dist.get_world_size()]]
    gathered: list[list[WrittenFile]] = [[]] * dist.get_world_size()
    dist.all_gather_object(gathered, ours)
    return [file for files in gathered for file in files]


@torch.no_grad()
def load_torch_dist(chunks: Sequence[GPTModel], directory: Path, *, vocab_size: int) -> None:
    """Fill this rank's part of the model, whatever layout wrote the checkpoint. Collective.

    Only tensors are read, by torch's reader of tensors alone: nothing that the checkpoint stores as a pickled object is
    opened.

    Args:
        vocab_size: without padding; the checkpoint's own padding may be another than ours.

    Raises:
        ValueError: it is damaged, of another model, or its index is not to be trusted; on all ranks.
    """
    _check_files(directory)
    fault, used, stored = None, set[str](), dict[str, StoredTensor | None]()
    try:
        stored = read_index(directory)
        num_layers = chunks[0].config.num_layers
        for kept in kept_weights(chunks):
            if not kept.boxes[0].key.startswith(ADAPTERS):
                boxes = tuple(as_stored(box, stored, num_layers) for box in kept.boxes)
                _fill(replace(kept, boxes=boxes), stored, directory, vocab_size)
                used.update(box.key for box in boxes)
    except (ValueError, OSError) as error:
        fault = str(error)
    raise_on_all(fault)
    _refuse_unused(stored, used, directory)


_LAYER = re.compile(r"(.*\bdecoder\.layers\.)(\d+)\.(.+)")
_LAYERS = re.compile(r"(.*\bdecoder\.layers\.)(\D.*)")


def as_stored(box: Box, stored: Mapping[str, StoredTensor | None], num_layers: int) -> Box:
    """The box under the name that the checkpoint has its tensor by.

    Megatron-core writes the layers of a model one by one (`decoder.layers.3.mlp...`) or stacked along a first dimension
    (`decoder.layers.mlp...`), as the program asks and as the config spells which layers have experts.
    """
    if box.key in stored:
        return box
    if match := _LAYER.fullmatch(box.key):
        prefix, layer, rest = match[1], int(match[2]), match[3]
        if f"{prefix}{rest}" in stored:
            return replace(
                box,
                key=f"{prefix}{rest}",
                global_shape=(num_layers, *box.global_shape),
                offset=(layer, *box.offset),
                shape=(1, *box.shape),
            )
    elif match := _LAYERS.fullmatch(box.key):
        single = f"{match[1]}{box.offset[0]}.{match[2]}"
        if single in stored:
            return replace(
                box,
                key=single,
                global_shape=box.global_shape[1:],
                offset=box.offset[1:],
                shape=box.shape[1:],
            )
    return box


def _fill(kept: Kept, stored: Mapping[str, StoredTensor | None], directory: Path, vocab_size: int) -> None:
    target = kept.tensor.view(-1)
    for box in kept.boxes:
        source = stored.get(box.key)
        if source is None:
            where = "as a pickled object, which is not loaded" if box.key in stored else "nowhere"
            raise ValueError(f"{directory}: {box.key}, which the model's config calls for, is stored {where}")
        fits = source.shape == box.global_shape or (
            box.padded and source.shape[1:] == box.global_shape[1:] and source.shape[0] >= vocab_size
        )
        if not fits:
            raise ValueError(
                f"{directory}: {box.key} has the shape {list(source.shape)}, and the model's config calls for "
                f"{[vocab_size, *box.global_shape[1:]] if box.padded else list(box.global_shape)}"
            )
        for ours in slabs(box, kept.start, kept.end):
            num_wanted = math.prod(
                max(min(first + size, limit) - first, 0)
                for first, size, limit in zip(ours.offset, ours.shape, source.shape, strict=True)
            )
            if num_wanted < math.prod(ours.shape):
                target[ours.flat_start : ours.flat_start + math.prod(ours.shape)] = 0
            num_copied = 0
            for chunk in source.chunks:
                theirs = Slab(offset=chunk.offset, shape=chunk.shape, flat_start=0)
                if overlap(ours, theirs):
                    num_copied += copy_shared(target, ours, _read(chunk, box.key), theirs)
            if num_copied != num_wanted:
                raise ValueError(
                    f"{directory}: of the {num_wanted} numbers of {box.key} that this rank needs, the files hold "
                    f"{num_copied}"
                )


def _read(chunk: StoredChunk, key: str) -> torch.Tensor:
    """The numbers of a chunk, flat."""
    try:
        with chunk.path.open("rb") as file:
            file.seek(chunk.start)
            tensor = torch.load(io.BytesIO(file.read(chunk.num_bytes)), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, LookupError, TypeError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{chunk.path}: {key} cannot be read: {reason}") from error
    if (
        type(tensor) is not torch.Tensor
        or tuple(tensor.shape) != chunk.shape
        or tensor.layout != torch.strided
    ):
        raise ValueError(
            f"{chunk.path}: what is stored as {key} is no tensor of the shape {list(chunk.shape)}"
        )
    return tensor.reshape(-1)


def _refuse_unused(stored: Mapping[str, StoredTensor | None], used: set[str], directory: Path) -> None:
    """Weights that no rank has a place for. The state of an optimizer, which other programs store beside them, is no
    weight."""
    gathered: list[set[str]] = [set()] * dist.get_world_size()
    dist.all_gather_object(gathered, used)
    unused = {name for name, tensor in stored.items() if tensor is not None}.difference(*gathered)
    unused = {name for name in unused if not name.startswith((*OPTIMIZERS, ADAPTERS))}
    if unused:
        raise ValueError(f"{directory} holds {min(unused)}, for which the model's config.json has no place")


def _check_files(directory: Path) -> None:
    marker = json.loads((directory / TORCH_DIST_MARKER).read_text(encoding="utf-8"))
    if marker.get("sharded_backend") != "torch_dist":
        raise ValueError(
            f"{directory} has the format {marker.get('sharded_backend')!r}, and only 'torch_dist' can be read"
        )
    faults: list[str] = []
    if (directory / CHECKSUMS).is_file():
        faults = find_faults(
            directory, share=dist.get_rank(), num_shares=dist.get_world_size(), marker=CHECKSUMS
        )
    elif not any(directory.glob("*.distcp")):
        faults = [f"{directory} has no .distcp file"]
    raise_on_all(f"{faults[0]}: the torch_dist checkpoint cannot be used" if faults else None)
