"""Indexes in directories: built from a passage file, and opened by what is in them, several of them as one.

DIRECTORY/passages.jsonl (+ .offsets)   the passages, or a link to them
DIRECTORY/tantivy/                      BM25
DIRECTORY/dense/                        vectors, see `dense`
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from polyturn.tools.search.bm25 import BM25Index
from polyturn.tools.search.dense import DenseIndex
from polyturn.tools.search.retrieval import Hit, Retriever

RANK_CONSTANT = 60
"""k of reciprocal rank fusion (Cormack, Clarke and Buettcher, SIGIR 2009)."""


class HybridRetriever:
    """Ranks passages by the sum over retrievers of weight / (60 + rank), ranks counted from 1.

    Passages are the same when their ids are. Each retriever is asked for `depth` passages, and a failing one fails the
    search.
    """

    def __init__(
        self, retrievers: Sequence[Retriever], *, weights: Sequence[float] | None = None, depth: int = 50
    ) -> None:
        """
        Args:
            retrievers: Two at least.
            weights: One for each; None weighs them equally.
            depth: How far down each is looked at, or `top_k` where that is more.

        Raises:
            ValueError: too few retrievers, or weights that do not fit them.
        """
        if len(retrievers) < 2:
            raise ValueError("a hybrid needs two retrievers at least")
        if weights is not None and len(weights) != len(retrievers):
            raise ValueError(f"{len(retrievers)} retrievers need as many weights, not {len(weights)}")
        self._retrievers = tuple(retrievers)
        self._weights = tuple(weights or [1.0] * len(retrievers))
        self._depth = depth

    def __len__(self) -> int:
        first: Any = self._retrievers[0]
        return len(first)

    def search(self, query: str, top_k: int) -> list[Hit]:
        """The `top_k` best of all; equal sums keep the order of the first retriever."""
        depth = max(self._depth, top_k)
        scores: dict[str, float] = {}
        hits: dict[str, Hit] = {}
        for retriever, weight in zip(self._retrievers, self._weights, strict=True):
            for rank, hit in enumerate(retriever.search(query, depth), start=1):
                scores[hit.passage_id] = scores.get(hit.passage_id, 0.0) + weight / (RANK_CONSTANT + rank)
                hits.setdefault(hit.passage_id, hit)
        best = sorted(scores, key=lambda passage_id: -scores[passage_id])[:top_k]
        return [replace(hits[passage_id], score=scores[passage_id]) for passage_id in best]

    def page(self, url: str) -> str | None:
        """The page under `url` of the first retriever that has it."""
        return first_page(self._retrievers, url)


def first_page(retrievers: Sequence[Retriever], url: str) -> str | None:
    """The page under `url` of the first that has it; those without pages are passed over."""
    finders = (getattr(retriever, "page", None) for retriever in retrievers)
    pages = (find(url) for find in finders if find is not None)
    return next((page for page in pages if page is not None), None)


Engine = Literal["auto", "bm25", "dense", "hybrid"]


def open_engine(directory: str | Path, kind: Engine = "auto") -> Retriever:
    """The engine in a directory; `auto` takes all that is there, and both together are hybrid.

    Raises:
        ValueError: there is none, or not of that kind.
    """
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
