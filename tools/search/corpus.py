"""Passages in files, as indexes read them, and whole pages by url."""

from __future__ import annotations

import gzip
import json
import mmap
import threading
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol, cast

import numpy as np
import orjson


class PassageLike(Protocol):
    """What can be indexed."""

    @property
    def id(self) -> str: ...

    @property
    def title(self) -> str: ...

    @property
    def text(self) -> str: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Passage:
    """One passage of a knowledge base."""

    id: str
    title: str
    text: str


PASSAGES_NAME = "passages.jsonl"
"""Of the passage file in an index's directory."""


def offsets_path(path: str | Path) -> Path:
    """Where the offsets of a passage file are kept."""
    return Path(f"{path}.offsets")


def write_passages(path: str | Path, passages: Iterable[PassageLike]) -> int:
    """Write passages as JSONL together with their offsets. Returns how many there were.

    A title that wiki-18's format cannot hold, with a line break or a double quote, is written in a field of its own.
    """
    offsets = [0]
    with Path(path).open("wb") as file:
        for passage in passages:
            row = {"id": passage.id, "contents": f'"{passage.title}"\n{passage.text}'}
            if "\n" in passage.title or '"' in passage.title:
                row = {"id": passage.id, "title": passage.title, "text": passage.text}
            file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
            offsets.append(file.tell())
    np.array(offsets, dtype="<u8").tofile(offsets_path(path))
    return len(offsets) - 1


def write_offsets(path: str | Path) -> int:
    """Write the offsets of a JSONL file from elsewhere. Returns its number of rows.

    Raises:
        ValueError: the file does not exist.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such passage file")
    with path.open("rb") as file:
        lengths = np.fromiter((len(line) for line in file), dtype="<u8")
    np.concatenate([np.zeros(1, dtype="<u8"), np.cumsum(lengths, dtype="<u8")]).tofile(offsets_path(path))
    return len(lengths)


def read_passages(path: str | Path) -> Iterator[Passage]:
    """The passages of a JSONL file in order, without its offsets.

    Raises:
        ValueError: the file does not exist, or `path:line: ...` a row that is not of this format.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such passage file")
    number = 0
    try:
        with _open(path) as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield parse_row(line, where=f"{path}:{number}")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path}:{number + 1}: the compressed file is damaged: {error}") from error


def is_compressed(path: Path) -> bool:
    """Whether a passage file has to be unpacked before it can be mapped into memory."""
    return path.suffix.lower() == ".gz"


def _open(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path, "rb")) if is_compressed(path) else path.open("rb")


class Passages:
    """The passages of a file by position, read through a memory map.

    Raises:
        ValueError: the file or its offsets are missing, or do not belong together.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise ValueError(f"{self.path}: no such passage file")
        if not offsets_path(self.path).is_file():
            raise ValueError(
                f"{self.path}: {offsets_path(self.path).name} is missing; write_offsets makes it"
            )
        self._offsets = np.fromfile(offsets_path(self.path), dtype="<u8")
        size = self.path.stat().st_size
        if len(self._offsets) == 0 or int(self._offsets[-1]) != size:
            raise ValueError(
                f"{self.path}: the offsets are not those of this file; write_offsets makes them anew"
            )
        self._file = self.path.open("rb")
        # An empty file cannot be mapped.
        self._map = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ) if size else None

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, index: int, /) -> Passage:
        if not 0 <= index < len(self):
            raise IndexError(f"passage {index} of {len(self)}")
        assert self._map is not None, "the passages are closed"
        row = self._map[int(self._offsets[index]) : int(self._offsets[index + 1])]
        return parse_row(row, where=f"{self.path}:{index + 1}")

    def __iter__(self) -> Iterator[Passage]:
        return (self[index] for index in range(len(self)))

    def close(self) -> None:
        """Unmap the file."""
        if self._map is not None:
            self._map.close()
            self._map = None
        self._file.close()


def place_passages(directory: Path, passages: Iterable[PassageLike] | Path | None) -> Passages:
    """The passages of an index's directory, put there first.

    Args:
        directory: It is made if need be.
        passages: A file of passages is linked, with its offsets here; a compressed one and others are written; None
            takes those that are there.

    Raises:
        ValueError: there are none, or the directory has passages already.
    """
    path = directory / PASSAGES_NAME
    if passages is not None:
        if path.exists():
            raise ValueError(f"{directory} holds passages already; use them, or build into another directory")
        if isinstance(passages, Path) and not passages.is_file():
            raise ValueError(f"{passages}: no such passage file")
        directory.mkdir(parents=True, exist_ok=True)
        if isinstance(passages, Path) and is_compressed(passages):
            passages = read_passages(passages)
        if isinstance(passages, Path):
            path.symlink_to(passages.resolve())
            write_offsets(path)
        else:
            write_passages(path, passages)
    return Passages(path)


def parse_row(row: bytes, *, where: str) -> Passage:
    """The passage of one row.

    Raises:
        ValueError: `where: ...`, the row is not one of this format.
    """
    try:
        fields = orjson.loads(row)
    except ValueError as error:
        raise ValueError(f"{where}: not a row of JSON: {error}") from error
    names = fields.keys() if isinstance(fields, dict) else set()
    passage_id = next((fields[name] for name in ("id", "_id") if name in names), None)
    if passage_id is None or not names & {"contents", "text"}:
        raise ValueError(f"{where}: not a row with 'id' and 'contents', or with '_id', 'title' and 'text'")
    for name in ("contents", "title", "text"):
        if not isinstance(fields.get(name, ""), str):
            raise ValueError(f"{where}: '{name}' must be a text, not {type(fields[name]).__name__}")
    if "contents" in names:
        title, _, text = fields["contents"].partition("\n")
        return Passage(id=str(passage_id), title=title.strip('"'), text=text)
    return Passage(id=str(passage_id), title=fields.get("title", ""), text=fields["text"])


_SCHEME = "passage:"


class Store(Protocol):
    """Passages by position."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> PassageLike: ...


class PassageFinder:
    """Finds passages by their id. In most corpora the id is the position; others are listed at the first miss."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._positions: dict[str, int] | None = None
        self._lock = threading.Lock()

    def page(self, url: str) -> str | None:
        """The contents of `passage:ID`; None for anything else."""
        if not url.startswith(_SCHEME):
            return None
        passage = self._find(url.removeprefix(_SCHEME))
        return None if passage is None else f'"{passage.title}"\n{passage.text}'

    def _find(self, passage_id: str) -> PassageLike | None:
        if passage_id.isascii() and passage_id.isdecimal() and len(passage_id) < 12:
            position = int(passage_id)
            if position < len(self._store) and self._store[position].id == passage_id:
                return self._store[position]
        with self._lock:
            if self._positions is None:
                self._positions = {self._store[index].id: index for index in range(len(self._store))}
        found = self._positions.get(passage_id)
        return None if found is None else self._store[found]


class PageFile:
    """The rows `{"url": ..., "contents": ...}` of a JSONL file; contents stay on disk.

    Raises:
        ValueError: there is no such file, or `path:line: ...` a row that is not of this form.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise ValueError(f"{path}: no such page file")
        self._rows: dict[str, tuple[int, int]] = {}
        offset = 0
        with self.path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    self._rows[_read_page(line, f"{path}:{number}")[0]] = (offset, len(line))
                offset += len(line)
        self._bytes = np.memmap(self.path, dtype=np.uint8, mode="r") if offset else None

    def page(self, url: str) -> str | None:
        """The page under `url`; None if there is none."""
        if url not in self._rows or self._bytes is None:
            return None
        offset, length = self._rows[url]
        return _read_page(self._bytes[offset : offset + length].tobytes(), str(self.path))[1]


def _read_page(line: bytes, where: str) -> tuple[str, str]:
    try:
        row = orjson.loads(line)
        url, contents = row["url"], row["contents"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{where}: not a row with 'url' and 'contents': {error}") from error
    if not isinstance(url, str) or not isinstance(contents, str):
        raise ValueError(f"{where}: 'url' and 'contents' must be texts")
    return url, contents
