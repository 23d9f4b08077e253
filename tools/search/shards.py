"""A corpus in several indexes, on this host or behind the servers of others, searched as one."""

from __future__ import annotations

from collections.abc import Sequence, Sized
from concurrent.futures import ThreadPoolExecutor
from typing import cast

from polyturn.tools.search.client import SearchClient
from polyturn.tools.search.engine import Engine, first_page, open_engine
from polyturn.tools.search.retrieval import Hit, Retriever

MAX_WAITING = 64
"""Searches of servers that are waited for at once, of all shards together."""


class ShardedRetriever:
    """Passages in several indexes, on this host or behind the servers of others, as if they were in one.

    Each shard is asked, and the best scores of all are the best. For that scores must mean the same everywhere: inner
    products do, and BM25's as far as words are as frequent in one shard as in another, so deal passages out like cards
    instead of cutting a sorted corpus in pieces. Ids must differ. A shard that fails fails the search: the rest of the
    passages is never taken for all of them.
    """

    def __init__(self, shards: Sequence[Retriever]) -> None:
        """
        Raises:
            ValueError: there are no shards.
        """
        if not shards:
            raise ValueError("there are no shards")
        self._here = tuple(shard for shard in shards if not isinstance(shard, SearchClient))
        self._elsewhere = tuple(shard for shard in shards if isinstance(shard, SearchClient))
        self._waiting = ThreadPoolExecutor(MAX_WAITING, thread_name_prefix="shard")

    def __len__(self) -> int:
        """Of the passages here; those behind servers are not counted."""
        return sum(len(shard) for shard in cast(tuple[Sized, ...], self._here))

    def search(self, query: str, top_k: int) -> list[Hit]:
        """The `top_k` best of all; equal scores keep the order of the shards, those here first."""
        # Servers are waited for all at once, while the indexes here are searched.
        answers = [self._waiting.submit(shard.search, query, top_k) for shard in self._elsewhere]
        hits = [hit for shard in self._here for hit in shard.search(query, top_k)]
        hits += [hit for answer in answers for hit in answer.result()]
        return sorted(hits, key=lambda hit: -hit.score)[:top_k]

    def page(self, url: str) -> str | None:
        """The page under `url` of the first index here that has it."""
        return first_page(self._here, url)


def open_shard(where: str, kind: Engine = "auto") -> Retriever:
    """The index in a directory, or a client of the search server at a URL.

    Raises:
        ValueError: there is no index, or not of that kind.
    """
    return SearchClient(where) if where.startswith(("http://", "https://")) else open_engine(where, kind)
