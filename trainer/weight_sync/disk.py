"""Weight sync through a Hugging Face directory that trainer and engines both see."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors.torch import save_file

from polyturn.rollout.engines.checksums import EngineChecksums
from polyturn.rollout.engines.control import EngineControl
from polyturn.rollout.whole_file import removed_on_failure
from polyturn.trainer.weight_sync import SyncReport


class DiskPublisher:
    """Writes each version into a directory of its own and has the engines load it."""

    def __init__(
        self,
        *,
        engines: Sequence[EngineControl],
        model_path: Path,
        directory: Path,
        new_checksums: Callable[[], EngineChecksums],
        flush_cache: bool = True,
    ) -> None:
        """`model_path` is the Hugging Face directory whose config and tokenizer go beside the weights.

        `flush_cache`: whether the engines drop the KV that the old weights made.
        """
        self._engines = engines
        self._model_path = model_path
        self._directory = directory
        self._new_checksums = new_checksums
        self._flush_cache = flush_cache
        self._previous: Path | None = None

    def publish(self, named_tensors: Iterable[tuple[str, torch.Tensor]], *, version: int) -> SyncReport:
        """Write, then load on every engine; see `WeightPublisher.publish`."""
        started = time.perf_counter()
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in named_tensors}
        target = self._directory / f"version_{version:06d}"
        self._write(tensors, target)
        with ThreadPoolExecutor(max_workers=len(self._engines)) as threads:
            replies = [
                threads.submit(
                    engine.update_weights_from_disk,
                    model_path=str(target),
                    weight_version=version,
                    flush_cache=self._flush_cache,
                )
                for engine in self._engines
            ]
            for reply in replies:
                reply.result()
        if self._previous is not None and self._previous != target:
            shutil.rmtree(self._previous, ignore_errors=True)
        self._previous = target
        checksums = self._new_checksums()
        for name, tensor in tensors.items():
            checksums.add(name, tensor)
        return SyncReport(
            version=version,
            num_tensors=len(tensors),
            num_bytes=sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()),
            seconds=time.perf_counter() - started,
            checksums=checksums.finish(),
        )

    def close(self) -> None:
        """Nothing is held open; the last version stays, since the engines serve from it."""

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
