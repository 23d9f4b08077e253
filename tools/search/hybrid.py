"""Several retrievers as one, by reciprocal rank fusion."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from polyturn.tools.search.types import Hit, Retriever

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
        finders = (getattr(retriever, "page", None) for retriever in self._retrievers)
        pages = (find(url) for find in finders if find is not None)
        return next((page for page in pages if page is not None), None)
