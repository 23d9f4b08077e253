"""The index of a torch_dist checkpoint, which is a pickle, read without running what it names.

A pickle can name any function and have it called, and torch unpickles `.metadata` as such. Here every name in it
becomes an inert record of its own: nothing of torch's is made, called or changed, and a name that no index holds is
refused. What is left are names, shapes and places in files, which are checked before a file is opened. Our own
checkpoints have no pickled part.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

METADATA = ".metadata"
_CHECKPOINT = "torch.distributed.checkpoint."
_PLAIN = {("torch", "Size"): tuple, ("collections", "OrderedDict"): dict}
"""What is read as a value of Python's own."""
_RECORDS = frozenset(
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
        ("pathlib", "PosixPath"),
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
"""(module, name) of what the index of a checkpoint is made of."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredChunk:
    """A box of a tensor, and where it is stored."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]
    path: Path
    start: int
    """Of its first byte in the file."""
    num_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredTensor:
    """A tensor of a checkpoint."""

    shape: tuple[int, ...]
    chunks: tuple[StoredChunk, ...]


class _UnknownName(Exception):
    """A pickle names something that no index holds."""


class _Record:
    """Stands for an object of a class that the pickle names."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments
        self.fields: dict[str, Any] = {}

    def __setstate__(self, state: Any) -> None:
        self.fields = state if isinstance(state, dict) else {}


class _Reader(pickle.Unpickler):
    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self._classes: dict[tuple[str, str], type] = {}

    def find_class(self, module: str, name: str) -> Any:
        named = (module, name)
        if named in _PLAIN:
            return _PLAIN[named]
        if named not in _RECORDS:
            raise _UnknownName(f"{module}.{name}")
        # Of this reading alone: a pickle may also set attributes of the classes that it names.
        return self._classes.setdefault(named, type(name, (_Record,), {}))

    def persistent_load(self, _pid: Any) -> Any:
        raise _UnknownName("a persistent object")


def read_index(directory: Path) -> dict[str, StoredTensor | None]:
    """The tensors of a torch_dist checkpoint by name, and None for what is stored as a pickled object.

    Raises:
        ValueError: the index is missing or damaged, names anything but what an index is made of, or a file outside the
            directory.
    """
    path = directory / METADATA
    if not path.is_file():
        raise ValueError(f"{directory} has no {METADATA}: the checkpoint was not finished")
    reader = _Reader(io.BytesIO(path.read_bytes()))
    try:
        root = reader.load()
        return _stored(root, directory)
    except _UnknownName as error:
        raise ValueError(
            f"{path} names {error}, which has no place in a checkpoint's index: it is not loaded, since what a pickle "
            "names may be run"
        ) from error
    except (
        pickle.UnpicklingError,
        ArithmeticError,
        AttributeError,
        EOFError,
        ImportError,
        LookupError,
        MemoryError,
        RecursionError,
        TypeError,
        ValueError,
    ) as error:
        reason = str(error) or type(error).__name__
        raise ValueError(f"{path} is damaged: {reason}") from error


def _stored(root: Any, directory: Path) -> dict[str, StoredTensor | None]:
    places = {
        (_field(key, "fqn", str), _numbers(key.fields.get("offset") or ())): place
        for key, place in _field(root, "storage_data", dict).items()
    }
    found: dict[str, StoredTensor | None] = {}
    for name, described in _field(root, "state_dict_metadata", dict).items():
        if not isinstance(name, str):
            raise ValueError("a tensor's name is no text")
        if type(described).__name__ != "TensorStorageMetadata":
            found[name] = None
            continue
        shape = _numbers(described.fields.get("size"))
        chunks = tuple(_chunks(name, described, places, directory))
        if any(not _lies_in(chunk, shape) for chunk in chunks):
            raise ValueError(f"a part of {name} lies outside its shape {list(shape)}")
        found[name] = StoredTensor(shape=shape, chunks=chunks)
    return found


def _chunks(
    name: str, described: _Record, places: dict[tuple[str, tuple[int, ...]], Any], directory: Path
) -> Iterator[StoredChunk]:
    for chunk in _field(described, "chunks", list):
        offset = _numbers(chunk.fields.get("offsets"))
        place = places.get((name, offset))
        if place is None:
            raise ValueError(f"it does not say where {name} is stored")
        if place.fields.get("transform_descriptors"):
            raise ValueError(f"{name} is stored compressed, which is not supported")
        start, num_bytes = _numbers((place.fields.get("offset"), place.fields.get("length")))
        yield StoredChunk(
            offset=offset,
            shape=_numbers(chunk.fields.get("sizes")),
            path=directory / _file_name(_field(place, "relative_path", str)),
            start=start,
            num_bytes=num_bytes,
        )


def _lies_in(chunk: StoredChunk, shape: tuple[int, ...]) -> bool:
    return len(chunk.offset) == len(chunk.shape) == len(shape) and all(
        first + size <= limit for first, size, limit in zip(chunk.offset, chunk.shape, shape, strict=True)
    )


def _file_name(text: str) -> str:
    if not text or PurePosixPath(text).name != text or text == "..":
        raise ValueError(f"it names the file {text!r}, which is not in the checkpoint's directory")
    return text


def _field(record: Any, name: str, kind: type) -> Any:
    value = record.fields.get(name) if isinstance(record, _Record) else None
    if not isinstance(value, kind):
        raise ValueError(f"it has no {name}")
    return value


def _numbers(value: Any) -> tuple[int, ...]:
    if not isinstance(value, tuple | list) or not all(type(one) is int and one >= 0 for one in value):
        raise ValueError(f"it holds {value!r:.60} where sizes belong")
    return tuple(value)
