"""Indexes in directories: built from a passage file, and opened by what is in them.

DIRECTORY/passages.jsonl (+ .offsets)   the passages, or a link to them
DIRECTORY/tantivy/                      BM25
DIRECTORY/dense/                        vectors, see `dense`
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from polyturn.tools.search.bm25 import BM25Index
from polyturn.tools.search.hybrid import HybridRetriever
from polyturn.tools.search.types import Retriever

Engine = Literal["auto", "bm25", "dense", "hybrid"]


def open_engine(directory: str | Path, kind: Engine = "auto") -> Retriever:
    """The engine in a directory; `auto` takes all that is there, and both together are hybrid.

    Raises:
        ValueError: there is none, or not of that kind.
    """
    from polyturn.tools.search.dense import DenseIndex

    folder = Path(directory)
    has_words, has_vectors = (folder / "tantivy").is_dir(), (folder / "dense").is_dir()
    if kind == "auto":
        kind = "hybrid" if has_words and has_vectors else "dense" if has_vectors else "bm25"
    match kind:
        case "bm25":
            return BM25Index.open(folder)
        case "dense":
            return DenseIndex.open(folder)
        case "hybrid":
            return HybridRetriever([BM25Index.open(folder), DenseIndex.open(folder)])
    raise ValueError(f"unknown kind of index {kind!r}; there are auto, bm25, dense and hybrid")
