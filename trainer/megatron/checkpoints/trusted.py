"""Pickled parts of torch_dist checkpoints, read without running what they name.

A pickle can name any function and have it called. `.metadata` of a torch_dist checkpoint is one, and torch loads it as
such; so it is first walked through by an unpickler that knows only the classes that such a file needs. Our own
checkpoints have no pickled part.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

METADATA = ".metadata"
_CHECKPOINT = "torch.distributed.checkpoint."
ALLOWED = frozenset(
    {
        *(
            (f"{_CHECKPOINT}metadata", name)
            for name in (
                "BytesStorageMetadata",
                "ChunkStorageMetadata",
                "Metadata",
                "MetadataIndex",
                "StorageMeta",
                "TensorProperties",
                "TensorStorageMetadata",
                "_MEM_FORMAT_ENCODING",
            )
        ),
        *(
            (f"{_CHECKPOINT}planner", name)
            for name in ("BytesIOWriteData", "SavePlan", "TensorWriteData", "WriteItem", "WriteItemType")
        ),
        *((f"{_CHECKPOINT}filesystem", name) for name in ("_StorageInfo", "_StoragePrefix")),
        ("collections", "OrderedDict"),
        ("pathlib", "PosixPath"),
        ("torch", "Size"),
        ("torch", "device"),
        ("torch.serialization", "_get_layout"),
        *(
            ("torch", name)
            for name in (
                "bfloat16",
                "bool",
                "float16",
                "float32",
                "float64",
                "float8_e4m3fn",
                "float8_e5m2",
                "int16",
                "int32",
                "int64",
                "int8",
                "uint8",
            )
        ),
    }
)
"""(module, name) of what the metadata of a checkpoint is made of. None of them does anything but hold values."""


class _Walker(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise ValueError(f"{module}.{name}")
        return super().find_class(module, name)


def check_metadata(directory: Path) -> None:
    """Refuse a torch_dist checkpoint whose pickled metadata names anything but checkpoint metadata.

    Raises:
        ValueError: it does, it is missing, or it is damaged.
    """
    path = directory / METADATA
    if not path.is_file():
        raise ValueError(f"{directory} has no {METADATA}: the checkpoint was not finished")
    data = io.BytesIO(path.read_bytes())
    try:
        _Walker(data).load()
    except ValueError as error:
        raise ValueError(
            f"{path} names {error}, which has no place in a checkpoint's metadata: it is not loaded, "
            "since what a pickle names is run"
        ) from error
    except (pickle.UnpicklingError, EOFError, AttributeError, ImportError, IndexError, KeyError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
