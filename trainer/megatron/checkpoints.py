"""The checkpoints of one rank, of its policy and of a critic beside it.

A copy of the rank's state is taken at once, and a thread writes it while training goes on: one safetensors file a rank.
Nothing is exchanged between ranks but the checksums at the end, so the cost of a save is one copy of the state; step
counts and the index of what lies where stand in the file's metadata.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import torch
import torch.distributed as dist

from polyturn.configs.schema.trainer import ParallelConfig
from polyturn.rollout.whole_file import whole_file
from polyturn.trainer.checkpoints.manifest import (
    CHUNK_BYTES,
    MARKER,
    CheckpointError,
    WrittenFile,
    check_header,
    describe_folders,
    describe_model,
    find_faults,
    read_manifest,
    write_manifest,
)
from polyturn.trainer.megatron.checkpoint_reader import load_checkpoint
from polyturn.trainer.megatron.checkpoint_state import (
    file_name,
    kept_state,
    num_optimizer_steps,
    random_state,
)
from polyturn.trainer.megatron.engine import Engine

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
ALIGNMENT = 8


def write_safetensors(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]
) -> WrittenFile:
    """Write contiguous CPU tensors; the file appears under its name once all of it is on the disk.

    Raises:
        OSError: the disk is full or fails.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    # The widest first, so that every tensor begins at a multiple of its element size.
    names = sorted(tensors, key=lambda name: -tensors[name].element_size())
    position = 0
    for name in names:
        tensor = tensors[name]
        end = position + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = orjson.dumps(header)
    text += b" " * (-len(text) % ALIGNMENT)
    prefix = struct.pack("<Q", len(text)) + text
    crc, num_bytes = zlib.crc32(prefix), len(prefix)
    with whole_file(path) as file:
        file.write(prefix)
        for name in names:
            view = memoryview(tensors[name].reshape(-1).view(torch.uint8).numpy())
            for start in range(0, len(view), CHUNK_BYTES):
                chunk = view[start : start + CHUNK_BYTES]
                crc = zlib.crc32(chunk, crc)
                file.write(chunk)
            num_bytes += len(view)
    return WrittenFile(name=path.name, num_bytes=num_bytes, crc32=crc)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Pending:
    directory: Path
    header: dict[str, Any]
    file: Future[WrittenFile]


class Checkpoints:
    """Writes the checkpoints of a rank's engines, one at a time, and reads them."""

    def __init__(
        self,
        engines: Mapping[str, Engine],
        *,
        hf_config: Mapping[str, Any],
        parallel: ParallelConfig,
        dtype: str,
        adapters: Mapping[str, Any] | None = None,
    ) -> None:
        """
        Args:
            engines: by the name that their state is filed under.
            adapters: what `describe_adapters` says of the policy's.
        """
        self._engines = dict(engines)
        self._model = {**describe_model(hf_config), "adapters": adapters}
        self._layout = {**parallel.model_dump(), "dtype": dtype}
        self._threads = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: _Pending | None = None

    def include(self, name: str, engine: Engine) -> None:
        """Write and load another engine of this rank, a critic's, with every checkpoint."""
        self._engines[name] = engine

    def begin(
        self, directory: Path, *, num_updates: int, entropy_bonus: Mapping[str, float] | None = None
    ) -> None:
        """Copy the state, and write it while training goes on. Collective; `finish` must follow before the next.

        Args:
            entropy_bonus: of the policy's next update, which the header keeps.
        """
        assert self._pending is None, "finish the checkpoint before"
        directory.mkdir(parents=True, exist_ok=True)
        if dist.get_rank() == 0:
            (directory / MARKER).unlink(missing_ok=True)
        dist.barrier()
        tensors, metadata = _snapshot(self._engines)
        path = directory / file_name(dist.get_rank(), dist.get_world_size())
        file = self._threads.submit(write_safetensors, path, tensors, metadata)
        header = {**self._model, "layout": self._layout, "num_updates": num_updates}
        if entropy_bonus is not None:
            header["entropy_bonus"] = dict(entropy_bonus)
        self._pending = _Pending(directory=directory, header=header, file=file)

    def written(self) -> bool:
        """Whether `finish` would not have to wait for this rank's disk."""
        return self._pending is None or self._pending.file.done()

    def finish(self) -> None:
        """Wait for the files of all ranks, then mark what was begun as finished. Collective.

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
        decided = [faults]
        dist.broadcast_object_list(decided, src=0)
        if decided[0]:
            raise CheckpointError(
                f"the checkpoint {pending.directory} was not written: {'; '.join(decided[0])}"
            ) from fault

    def find_faults(self, directory: Path) -> list[str]:
        """What is wrong with this rank's share of a checkpoint's files; all of them are read among the ranks."""
        return find_faults(directory, share=dist.get_rank(), num_shares=dist.get_world_size())

    def load(self, directory: Path, *, with_optimizer: bool = True) -> int:
        """Restore every engine, whatever layout wrote the checkpoint; the number of updates it was written after.

        At the layout that wrote it, the next update is bitwise the one of an uninterrupted run. At another one, the
        weights and moments are the same and the generators begin anew.

        Raises:
            ValueError: no finished checkpoint, or one of another model, or of other adapters.
        """
        header, _ = read_manifest(directory)
        check_header(header, self._model, source=directory)
        load_checkpoint(
            self._engines,
            directory,
            same_layout=header["layout"] == self._layout,
            with_optimizer=with_optimizer,
        )
        return int(header["num_updates"])


@torch.no_grad()
def _snapshot(engines: Mapping[str, Engine]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
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
