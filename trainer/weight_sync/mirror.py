"""A whole copy of the newest version on a host's own disk, kept up to date by changes, for the engines there to load.

It is a Hugging Face directory: the files beside the weights, and the weights in as many safetensors files as there were
buckets when it was last written whole. `VERSION` says which version they are; it is not there while they change, so
that what a killed process left is no version at all.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from polyturn.trainer.weight_sync.delta import Bytes, Patch, apply_patch

VERSION = "VERSION"
HEADER_ALIGNMENT = 8


class Mirror:
    """The copy in one directory. One process writes it."""

    def __init__(self, directory: Path, files: Mapping[str, bytes]) -> None:
        """`files`: by name, what stands beside the weights: config and tokenizer."""
        self._directory = directory
        self._files = dict(files)
        self._tensors: dict[str, Bytes] = {}
        self._num_parts = 0
        self.version: int | None = None
        """None: there is nothing that changes could be applied to."""

    @property
    def path(self) -> Path:
        return self._directory

    def read(self, name: str) -> Bytes:
        """A tensor's bytes in the version that is there."""
        return self._tensors[name]

    def begin(self, base: int | None) -> None:
        """Be about to become the next version, from the version `base`; None: from nothing."""
        assert base is None or base == self.version, f"{self._directory} holds {self.version}, not {base}"
        self.version = None
        (self._directory / VERSION).unlink(missing_ok=True)
        if base is None:
            self._tensors, self._num_parts = {}, 0
            shutil.rmtree(self._directory, ignore_errors=True)
            self._directory.mkdir(parents=True)
            for name, content in self._files.items():
                (self._directory / name).write_bytes(content)

    def take(self, patches: Sequence[Patch]) -> None:
        """Apply the changes of some tensors.

        Raises:
            DeltaError: they do not belong to what is here; the next version has to come whole.
        """
        new = [patch for patch in patches if patch.name not in self._tensors]
        if new:
            self._add_part(new)
        for patch in patches:
            apply_patch(patch, self._tensors[patch.name])

    def finish(self, version: int) -> str:
        """Be this version; the path of the directory."""
        self.version = version
        (self._directory / VERSION).write_text(f"{version}\n", encoding="utf-8")
        return str(self._directory)

    def _add_part(self, patches: Sequence[Patch]) -> None:
        """Make room for tensors, in a file of their own."""
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        at = 0
        for patch in patches:
            size = int(np.prod(patch.shape, dtype=np.int64)) * BYTES_OF[patch.dtype]
            header[patch.name] = {
                "dtype": patch.dtype,
                "shape": list(patch.shape),
                "data_offsets": [at, at + size],
            }
            at += size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % HEADER_ALIGNMENT)
        self._num_parts += 1
        path = self._directory / f"part-{self._num_parts:05d}.safetensors"
        start = 8 + len(text)
        with path.open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(start + at)
        data: Bytes = np.memmap(path, dtype=np.uint8, mode="r+", offset=0)
        for patch in patches:
            begin, end = header[patch.name]["data_offsets"]
            self._tensors[patch.name] = data[start + begin : start + end]


def files_beside_weights(model_path: Path) -> dict[str, bytes]:
    """Config, tokenizer and the like of a Hugging Face directory, by name."""
    return {
        path.name: path.read_bytes()
        for path in model_path.iterdir()
        if path.is_file() and path.suffix != ".safetensors" and "index" not in path.name
    }


BYTES_OF = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "I64": 8, "I32": 4, "U8": 1}
