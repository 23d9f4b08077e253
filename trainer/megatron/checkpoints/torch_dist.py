"""A model's weights in Megatron-core's own format, `torch_dist`, at any layout.

Upstream's writer starts a manager process and one process a file, which takes seconds; this one writes the same files
from the rank itself. Weights only: what a run resumes from is the format beside this one.

Import only after `install_cpu_compatibility`.
"""

from __future__ import annotations

import json
import os
import uuid
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import (
    CheckpointingException,
    ShardedObject,
)
from megatron.core.dist_checkpointing.strategies.base import LoadCommonStrategy
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from megatron.core.models.gpt.gpt_model import GPTModel
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_saver import _save_state_dict

from polyturn.trainer.megatron.checkpoints.manifest import (
    WrittenFile,
    describe_file,
    find_faults,
    sync_directory,
    write_manifest,
)
from polyturn.trainer.megatron.checkpoints.reader import raise_on_all
from polyturn.trainer.megatron.checkpoints.sources import HF_FOLDER, TORCH_DIST_MARKER
from polyturn.trainer.megatron.checkpoints.state import sharding_metadata
from polyturn.trainer.megatron.checkpoints.trusted import check_metadata
from polyturn.trainer.megatron.hf_directory import copy_small_files

CHECKSUMS = "checksums.json"
"""Of every file, where we wrote the directory; Megatron-LM writes none, and damage then shows only in the structure."""
ADAPTERS = "lora."
"""The module of a model that holds LoRA's."""


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


class _NoCommonState(LoadCommonStrategy):
    """Does not open `common.pt`: the weights do not need it, and those of other programs hold their own classes."""

    can_handle_sharded_objects = True

    def load_common(self, _checkpoint_dir: Any) -> dict[str, Any]:
        return {}

    def load_sharded_objects(self, _sharded_objects_state_dict: Any, _checkpoint_dir: Any) -> dict[str, Any]:
        return {}

    def check_backend_compatibility(self, _loaded_version: Any) -> None: ...

    def check_version_compatibility(self, _loaded_version: Any) -> None: ...


def save_torch_dist(chunks: Sequence[GPTModel], directory: Path, *, hf_directory: Path) -> None:
    """Write the weights; the directory appears whole or not at all. Collective.

    Args:
        hf_directory: its config and tokenizer are copied into `HF_FOLDER`, so that the way back needs nothing else.

    Raises:
        OSError: the directory is there already, and not empty.
        CheckpointException: a rank could not write; raised on all of them.
    """
    names: list[Any] = [f"{directory.name}.{uuid.uuid4().hex[:8]}.part"]
    dist.broadcast_object_list(names, src=0)
    part = directory.with_name(names[0])
    if dist.get_rank() == 0:
        part.mkdir(parents=True)
    dist.barrier()
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
        os.replace(part, directory)
        sync_directory(directory.parent)
    dist.barrier()


def _describe_files(directory: Path) -> list[WrittenFile]:
    """Size and checksum of every file, each taken by some rank."""
    paths = sorted(path for path in directory.iterdir() if path.is_file())
    ours = [describe_file(path) for path in paths[dist.get_rank() :: dist.get_world_size()]]
    gathered: list[list[WrittenFile]] = [[]] * dist.get_world_size()
    dist.all_gather_object(gathered, ours)
    return [file for files in gathered for file in files]


@torch.no_grad()
def load_torch_dist(chunks: Sequence[GPTModel], directory: Path) -> None:
    """Fill this rank's part of the model, whatever layout wrote the checkpoint. Collective.

    Raises:
        ValueError: it is damaged, of another model, or its metadata is not to be trusted.
    """
    _check_files(directory)
    check_metadata(directory)
    state = {
        str(index): _weights_of(chunk.sharded_state_dict(metadata=sharding_metadata()))
        for index, chunk in enumerate(chunks)
    }
    targets = {
        chunk_name: {name: value.data for name, value in chunk_state.items()}
        for chunk_name, chunk_state in state.items()
    }
    try:
        with warnings.catch_warnings():
            # Upstream loads by a name that torch is about to drop.
            warnings.filterwarnings(
                "ignore", category=FutureWarning, message="`load_state_dict` is deprecated"
            )
            loaded = dist_checkpointing.load(state, str(directory), common_strategy=_NoCommonState())
    except (CheckpointingException, CheckpointException, KeyError) as error:
        told = (str(error) or type(error).__name__).strip().splitlines()[-1]
        raise ValueError(f"{directory} is damaged or of another model: {told}") from error
    for chunk_name, chunk_targets in targets.items():
        for name, target in chunk_targets.items():
            source = loaded[chunk_name][name]
            if source.data_ptr() != target.data_ptr():
                target.copy_(source)


def _weights_of(state: dict[str, Any]) -> dict[str, Any]:
    """Without adapters, which belong to the run, and without Transformer Engine's extra states: when nothing is trained
    in FP8 they say nothing, and without Transformer Engine nobody has written them."""
    return {
        name: value
        for name, value in state.items()
        if not isinstance(value, ShardedObject) and not name.startswith(ADAPTERS)
    }


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
