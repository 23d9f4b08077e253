"""Weight sync through a Hugging Face directory that trainer and engines both see."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from polyturn.rollout.engines.checksums import EngineChecksums
from polyturn.rollout.whole_file import removed_on_failure
from polyturn.trainer.weight_sync import SyncReport
from polyturn.trainer.weight_sync.engine_calls import EngineCalls
from polyturn.trainer.weight_sync.tally import Tally

TIMEOUT_S = 600.0
"""How long an engine may take to load a version."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Prepared:
    """A version on disk that the engines do not serve yet."""

    version: int
    path: Path
    tally: Tally
    seconds: float


class DiskPublisher:
    """Writes each version into a directory of its own while the engines serve, and then has them load it."""

    def __init__(
        self,
        *,
        model_path: Path,
        directory: Path,
        new_checksums: Callable[[], EngineChecksums] | None,
        flush_cache: bool = True,
    ) -> None:
        """`model_path` is the Hugging Face directory whose config and tokenizer go beside the weights.

        `flush_cache`: whether the engines drop the KV that the old weights made.
        """
        self._engines = EngineCalls([], timeout_s=TIMEOUT_S)
        self._model_path = model_path
        self._directory = directory
        self._new_checksums = new_checksums
        self._flush_cache = flush_cache
        self._previous: Path | None = None
        self._prepared: _Prepared | None = None

    def set_engines(self, urls: Sequence[str]) -> None:
        """Nothing is joined; see `WeightPublisher.set_engines`."""
        self._engines.close()
        self._engines = EngineCalls(urls, timeout_s=TIMEOUT_S)

    def prepare(self, named_tensors: Iterable[tuple[str, torch.Tensor]], *, version: int) -> None:
        """Write the version; see `WeightPublisher.prepare`."""
        started = time.perf_counter()
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in named_tensors}
        target = self._directory / f"version_{version:06d}"
        self._write(tensors, target)
        tally = Tally(self._new_checksums)
        for name, tensor in tensors.items():
            tally.add(name, tensor)
        seconds = time.perf_counter() - started
        self._prepared = _Prepared(version=version, path=target, tally=tally, seconds=seconds)

    def activate(self) -> SyncReport:
        """Load it on every engine; see `WeightPublisher.activate`."""
        assert self._prepared is not None, "prepare comes first"
        prepared, self._prepared = self._prepared, None
        started = time.perf_counter()
        self._engines.ask(
            lambda engine: engine.update_weights_from_disk(
                model_path=str(prepared.path),
                weight_version=prepared.version,
                flush_cache=self._flush_cache,
            ),
            doing="load the weights on disk",
        )
        self._engines.check_version(prepared.version)
        pause_seconds = time.perf_counter() - started
        if self._previous is not None and self._previous != prepared.path:
            shutil.rmtree(self._previous, ignore_errors=True)
        self._previous = prepared.path
        report = prepared.tally.report(
            version=prepared.version,
            seconds=prepared.seconds + pause_seconds,
            pause_seconds=pause_seconds,
        )
        return replace(report, directory=prepared.path)

    def close(self) -> None:
        """Nothing is held open; the last version stays, since the engines serve from it."""
        self._engines.close()

    def _write(self, tensors: dict[str, torch.Tensor], target: Path) -> None:
        partial = target.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        with removed_on_failure(partial):
            for source in self._model_path.iterdir():
                if source.is_file() and source.suffix != ".safetensors" and "index" not in source.name:
                    shutil.copy2(source, partial)
            save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
            shutil.rmtree(target, ignore_errors=True)
            os.replace(partial, target)
