"""The checkpoints of one policy: what a header says, and whether a layout is the one that wrote it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from polyturn.configs.schema.trainer import ParallelConfig
from polyturn.trainer.checkpoints.manifest import check_header, describe_model, find_faults, read_manifest
from polyturn.trainer.megatron.checkpoint_reader import load_checkpoint
from polyturn.trainer.megatron.checkpoint_writer import CheckpointWriter
from polyturn.trainer.megatron.engine import Engine


class PolicyCheckpoints:
    """Writes and reads the checkpoints of the engines of one rank."""

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
            engines: by the name that their state is filed under: the policy's, and a critic's beside it.
            adapters: what `describe_adapters` says of the policy's.
        """
        self._engines = engines
        self._model = {**describe_model(hf_config), "adapters": adapters}
        self._layout = {**parallel.model_dump(), "dtype": dtype}
        self._writer = CheckpointWriter()

    def begin(self, directory: Path, *, num_updates: int) -> None:
        """Copy the state, and write it while training goes on. Collective; `finish` must follow before the next."""
        header = {**self._model, "layout": self._layout, "num_updates": num_updates}
        self._writer.begin(self._engines, directory, header=header)

    def written(self) -> bool:
        """Whether `finish` would not have to wait for this rank's disk."""
        return self._writer.written()

    def finish(self) -> None:
        """Wait for what was begun, and mark it as finished. Collective.

        Raises:
            CheckpointError: a rank could not write; raised on all of them.
        """
        self._writer.finish()

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
