"""Writing a checkpoint: a copy of this rank's state is taken at once, and a thread writes it while training goes on.

One safetensors file a rank. Nothing is exchanged between ranks but the checksums at the end, so the cost of a save is
one copy of the state; a step count, the index of what lies where and the header stand in the file's metadata.

Import only after `install_cpu_compatibility`.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import torch
import torch.distributed as dist

from polyturn.trainer.megatron.checkpoints.manifest import (
    MARKER,
    CheckpointError,
    WrittenFile,
    describe_folders,
    write_manifest,
)
from polyturn.trainer.megatron.checkpoints.safetensors_file import write_safetensors
from polyturn.trainer.megatron.checkpoints.state import kept_state, num_optimizer_steps, random_state
from polyturn.trainer.megatron.engine import Engine


@dataclass(frozen=True, kw_only=True, slots=True)
class _Pending:
    directory: Path
    header: dict[str, Any]
    file: Future[WrittenFile]


class CheckpointWriter:
    """Writes checkpoints of one rank, one at a time."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: _Pending | None = None

    @property
    def pending(self) -> bool:
        """Whether a checkpoint was begun and not finished."""
        return self._pending is not None

    def begin(self, engines: Mapping[str, Engine], directory: Path, *, header: dict[str, Any]) -> None:
        """Copy the state and start to write it. Collective; the one before must have been finished.

        Args:
            engines: by the name that their tensors are filed under.
            header: JSON values that `read_manifest` gives back.
        """
        assert self._pending is None, "finish the checkpoint before"
        directory.mkdir(parents=True, exist_ok=True)
        if dist.get_rank() == 0:
            (directory / MARKER).unlink(missing_ok=True)
        dist.barrier()
        tensors, metadata = snapshot(engines)
        path = directory / file_name(dist.get_rank(), dist.get_world_size())
        file = self._threads.submit(write_safetensors, path, tensors, metadata)
        self._pending = _Pending(directory=directory, header=header, file=file)

    def written(self) -> bool:
        """Whether `finish` would not have to wait for this rank's disk."""
        return self._pending is None or self._pending.file.done()

    def finish(self) -> None:
        """Wait for the files of all ranks, then mark the checkpoint as finished. Collective.

        Raises:
            CheckpointError: a rank could not write; raised on all of them.
        """
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        fault = pending.file.exception()
        ours = None if fault is not None else pending.file.result()
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, (ours, fault and f"{type(fault).__name__}: {fault}"))
        faults = [f"rank {rank}: {text}" for rank, (_, text) in enumerate(gathered) if text]
        if not faults and dist.get_rank() == 0:
            try:
                files = [file for file, _ in gathered] + describe_folders(pending.directory)
                write_manifest(pending.directory, pending.header, files)
            except OSError as error:
                faults = [f"rank 0: {error}"]
        told = [faults]
        dist.broadcast_object_list(told, src=0)
        if told[0]:
            raise CheckpointError(
                f"the checkpoint {pending.directory} was not written: {'; '.join(told[0])}"
            ) from fault


FILE_PREFIX = "rank-"


def file_name(rank: int, world_size: int) -> str:
    return f"{FILE_PREFIX}{rank:05d}-of-{world_size:05d}.safetensors"


@torch.no_grad()
def snapshot(engines: Mapping[str, Engine]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """A copy of this rank's state on the CPU: the tensors of its file, and the file's metadata."""
    tensors = {name: state.clone() for name, state in random_state().items()}
    index: list[Any] = []
    steps = {}
    for engine_name, engine in engines.items():
        steps[engine_name] = num_optimizer_steps(engine)
        for kept in kept_state(engine):
            name = str(len(index))
            for state_name, state in kept.states.items():
                tensors[f"{name}.{state_name}"] = state.to("cpu", copy=True)
            boxes = [box.as_json() for box in kept.boxes]
            index.append([engine_name, kept.start, kept.end, sorted(kept.states), boxes])
    metadata = {"index": orjson.dumps(index).decode(), "steps": orjson.dumps(steps).decode()}
    return tensors, metadata
