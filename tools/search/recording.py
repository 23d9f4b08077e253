"""Answers kept in a file, and searches answered from it: the same episode without a search engine."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

import orjson

from polyturn.tools.search.types import Hit, SearchUnavailable


class Recorder:
    """Adds answers to a JSONL file, one a line. Safe in threads."""

    def __init__(self, path: str | Path) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        self._file = Path(path).open("ab")  # noqa: SIM115  open until close()
        self._lock = threading.Lock()

    def add(self, query: str, top_k: int, hits: Sequence[Hit]) -> None:
        """Keep one answer."""
        row = [[hit.passage_id, hit.title, hit.text, hit.score] for hit in hits]
        line = orjson.dumps({"query": query, "top_k": top_k, "hits": row}) + b"\n"
        with self._lock:
            self._file.write(line)
            self._file.flush()

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._file.close()


class ReplayRetriever:
    """Answers from recorded files what was asked then; anything else is unavailable.

    Raises:
        ValueError: there is no such file, or `path:line: ...` a row that was not recorded by `Recorder`.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise ValueError(f"{path}: no such recording")
        self._answers: dict[tuple[str, int], tuple[Hit, ...]] = {}
        with self.path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                try:
                    row = orjson.loads(line)
                    key = str(row["query"]), int(row["top_k"])
                    self._answers[key] = tuple(
                        Hit(passage_id=passage_id, title=title, text=text, score=score)
                        for passage_id, title, text, score in row["hits"]
                    )
                except (ValueError, KeyError, TypeError) as error:
                    raise ValueError(f"{path}:{number}: not a recorded answer: {error}") from error

    def search(self, query: str, top_k: int) -> Sequence[Hit]:
        """The recorded answer.

        Raises:
            SearchUnavailable: this was not asked when the recording was made.
        """
        if (query, top_k) not in self._answers:
            raise SearchUnavailable(f"{self.path} has no answer to {query!r} with top_k {top_k}")
        return self._answers[query, top_k]
