"""Whole pages by url: passages of an index, and a file of pages beside it."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Protocol

import numpy as np
import orjson

from polyturn.tools.search.corpus import PassageLike

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
