"""A checkpoint into an engine, whatever layout wrote it.

A rank that finds exactly its own parts in its own file takes them from there, bit for bit and without looking further.
What it does not find there it puts together from the files of all ranks.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import torch
import torch.distributed as dist
from megatron.core.models.gpt.gpt_model import GPTModel
from safetensors import SafetensorError, safe_open

from polyturn.trainer.checkpoints.manifest import read_manifest
from polyturn.trainer.megatron.checkpoint_state import (
    BUFFER,
    FILE_PREFIX,
    RANDOM,
    WEIGHT,
    Box,
    Kept,
    Slab,
    copy_shared,
    file_name,
    finish_optimizer,
    kept_state,
    kept_weights,
    model_shard,
    prepare_optimizer,
    restore_random_state,
    slabs,
)
from polyturn.trainer.megatron.engine import Engine
from polyturn.trainer.megatron.process_groups import raise_on_all


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """A tensor of a checkpoint's file, and where it belongs."""

    file: Any
    """The open safetensors file."""
    name: str
    start: int
    end: int
    states: tuple[str, ...]
    boxes: tuple[Box, ...]

    def read(self, state: str) -> torch.Tensor:
        """[end - start]; mapped from the file, so that only what is used is read."""
        return self.file.get_tensor(f"{self.name}.{state}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """What one entry holds of one global tensor."""

    entry: Entry
    slab: Slab


class CheckpointReader:
    """An open checkpoint."""

    def __init__(self, directory: Path) -> None:
        """Open the files of a finished checkpoint.

        Raises:
            ValueError: there is none, or a file of it is missing.
        """
        self.directory = directory
        self.header, written = read_manifest(directory)
        self._stack = ExitStack()
        self._entries: dict[tuple[str, str], list[Entry]] = {}
        self.num_steps: dict[str, int] = {}
        self._files: dict[str, Any] = {}
        for file in written:
            if not file.name.startswith(FILE_PREFIX):
                continue
            path = directory / file.name
            if not path.is_file():
                self.close()
                raise ValueError(f"{path} is missing")
            try:
                opened = self._stack.enter_context(safe_open(path, framework="pt"))
            except SafetensorError as error:
                self.close()
                raise ValueError(f"{path} is damaged: {error}") from error
            self._files[file.name] = opened
            self.num_steps.update(orjson.loads(opened.metadata()["steps"]))
            for number, (engine, start, end, states, boxes) in enumerate(
                orjson.loads(opened.metadata()["index"])
            ):
                entry = Entry(
                    file=opened,
                    name=str(number),
                    start=start,
                    end=end,
                    states=tuple(states),
                    boxes=tuple(Box.from_json(box) for box in boxes),
                )
                self._entries.setdefault((file.name, engine), []).append(entry)
        self._pieces: dict[str, dict[str, list[Piece]]] = {}
        self._shapes: dict[str, dict[str, tuple[int, ...]]] = {}

    def close(self) -> None:
        self._stack.close()

    def own_entries(self, engine: str) -> list[Entry]:
        """What this rank's own file holds, if as many ranks wrote the checkpoint as read it."""
        return self._entries.get((file_name(dist.get_rank(), dist.get_world_size()), engine), [])

    def random_state(self) -> dict[str, torch.Tensor] | None:
        """The generators of this rank, if as many ranks wrote the checkpoint as read it."""
        file = self._files.get(file_name(dist.get_rank(), dist.get_world_size()))
        if file is None:
            return None
        return {name: file.get_tensor(name) for name in file.keys() if name.startswith(RANDOM)}  # noqa: SIM118

    def assemble(self, engine: str, kept: Kept, *, only: str | None = None) -> dict[str, torch.Tensor]:
        """The states of a part, put together from what all ranks wrote: name -> [end - start], float32 or as written.

        Args:
            only: the one state that is wanted.

        Raises:
            ValueError: the checkpoint is of another model.
        """
        result: dict[str, torch.Tensor] = {}
        num_copied: dict[str, int] = defaultdict(int)
        num_wanted = 0
        for box in kept.boxes:
            for ours in slabs(box, kept.start, kept.end):
                num_wanted += self._num_written(engine, box, ours)
                for piece in self._candidates(engine, box.key, ours):
                    for state in piece.entry.states if only is None else (only,):
                        source = piece.entry.read(state)
                        if state not in result:
                            result[state] = torch.zeros(kept.end - kept.start, dtype=source.dtype)
                        num_copied[state] += copy_shared(result[state], ours, source, piece.slab)
        wrong = {state: count for state, count in num_copied.items() if count != num_wanted}
        if wrong or (num_wanted and not result):
            key = kept.boxes[0].key
            raise ValueError(
                f"{self.directory}: of the {num_wanted} elements of {key} that this rank needs, the files hold "
                f"{wrong or 'none'}: the checkpoint is of another model, or of a release that named it otherwise"
            )
        return result

    def _num_written(self, engine: str, box: Box, ours: Slab) -> int:
        """How many elements of a slab the checkpoint must hold: all, but for a padding that it does not have."""
        self._index(engine)
        written = self._shapes[engine].get(box.key)
        if written is None:
            raise ValueError(f"{self.directory} holds the checkpoint of another model: it has no {box.key}")
        fits = written == box.global_shape or (box.padded and written[1:] == box.global_shape[1:])
        if not fits:
            raise ValueError(
                f"{self.directory} holds the checkpoint of another model: there {box.key} is {list(written)}, "
                f"here {list(box.global_shape)}"
            )
        count = 1
        for offset, size, limit in zip(ours.offset, ours.shape, written, strict=True):
            count *= max(min(offset + size, limit) - offset, 0)
        return count

    def _candidates(self, engine: str, key: str, ours: Slab) -> Iterator[Piece]:
        pieces = self._index(engine)[key]
        if not ours.offset:
            yield from pieces
            return
        low, high = ours.offset[0], ours.offset[0] + ours.shape[0]
        for piece in pieces:
            first = piece.slab.offset[0]
            if first < high and low < first + piece.slab.shape[0]:
                yield piece

    def _index(self, engine: str) -> dict[str, list[Piece]]:
        """The pieces of an engine's tensors by key. Made when a part is first looked for beyond the own file."""
        if engine not in self._pieces:
            pieces: dict[str, list[Piece]] = defaultdict(list)
            shapes: dict[str, tuple[int, ...]] = {}
            for (_, owner), entries in self._entries.items():
                for entry in entries if owner == engine else ():
                    for box in entry.boxes:
                        if not box.main:
                            continue
                        shapes[box.key] = box.global_shape
                        pieces[box.key].extend(
                            Piece(entry=entry, slab=slab) for slab in slabs(box, entry.start, entry.end)
                        )
            self._pieces[engine], self._shapes[engine] = pieces, shapes
        return self._pieces[engine]


@torch.no_grad()
def load_checkpoint(
    engines: Mapping[str, Engine], directory: Path, *, same_layout: bool, with_optimizer: bool = True
) -> dict[str, Any]:
    """Restore this rank, and return the header. Collective.

    Args:
        same_layout: the layout is the one that wrote the checkpoint, so this rank's own file holds what it needs, and
            its generators go on where they were.
        with_optimizer: False takes the weights alone.

    Raises:
        ValueError: no finished checkpoint, or one of another model; raised on all ranks.
    """
    fault, header = None, {}
    try:
        header = _restore(engines, directory, same_layout=same_layout, with_optimizer=with_optimizer)
    except ValueError as error:
        fault = str(error)
    raise_on_all(fault)
    for engine in engines.values():
        finish_optimizer(engine)
    return header


def _restore(
    engines: Mapping[str, Engine], directory: Path, *, same_layout: bool, with_optimizer: bool
) -> dict[str, Any]:
    reader = CheckpointReader(directory)
    try:
        for name, engine in engines.items():
            num_steps = reader.num_steps.get(name, 0) if with_optimizer else 0
            prepare_optimizer(engine, num_steps)
            own = reader.own_entries(name) if same_layout else []
            for position, kept in enumerate(kept_state(engine)):
                entry = own[position] if position < len(own) else None
                if entry is not None and kept.same_place((entry.boxes, entry.start, entry.end)):
                    tensors = {state: entry.read(state) for state in entry.states}
                else:
                    tensors = reader.assemble(name, kept)
                _store(kept, tensors, with_moments=num_steps > 0)
        random = reader.random_state() if same_layout else None
        if random is not None:
            restore_random_state(random)
    finally:
        reader.close()
    return reader.header


@torch.no_grad()
def load_weights(chunks: Sequence[GPTModel], directory: Path, *, engine: str = "policy") -> None:
    """Fill models that nobody trains with a checkpoint's weights. Every rank calls it.

    Raises:
        ValueError: no finished checkpoint, or one of another model.
    """
    reader = CheckpointReader(directory)
    try:
        for kept in kept_weights(chunks):
            (state,) = kept.states
            kept.tensor.view(-1).copy_(reader.assemble(engine, kept, only=state)[state])
    finally:
        reader.close()


def _store(kept: Kept, tensors: Mapping[str, torch.Tensor], *, with_moments: bool) -> None:
    wanted = set(kept.states) if with_moments or kept.owner is None else {WEIGHT}
    missing = wanted - set(tensors)
    if missing:
        raise ValueError(
            f"the checkpoint has no {min(missing)} of {kept.boxes[0].key}: "
            "it was written with another kind of optimizer"
        )
    if kept.owner is None:
        kept.tensor.view(-1).copy_(tensors[BUFFER])
        return
    device = kept.tensor.device
    # Copies: what was read may be a window on the file.
    moved = {name: tensors[name].to(device=device, copy=True) for name in wanted}
    kept.owner._set_main_param_and_optimizer_states(kept.tensor, moved)
    shard = model_shard(kept.owner, kept.tensor)
    if shard is not None:
        shard.copy_(moved[WEIGHT])
