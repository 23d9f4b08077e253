"""Which retriever an environment searches with. Heavy ones are shared by all environments of the process."""

from __future__ import annotations

import functools
from pathlib import Path

from polyturn.envs.two_hop.env import build_index
from polyturn.envs.two_hop.world import WorldSize
from polyturn.tools.search.retrieval import Retriever

REPLAY = "replay:"
"""Before the path of recorded answers, in place of a server's url."""


def choose_retriever(
    *,
    index: str | Path | None,
    corpus: str | Path | None,
    search_url: str | None,
    retriever: Retriever | None,
    world_seed: int,
) -> Retriever:
    """The one retriever that was asked for; the two-hop world's where none was.

    Raises:
        ValueError: more than one was asked for, or it cannot be opened.
    """
    asked = {"index": index, "corpus": corpus, "search_url": search_url, "retriever": retriever}
    given = [name for name, value in asked.items() if value is not None]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} exclude each other: there is one search engine")
    if retriever is not None:
        return retriever
    if index is not None:
        return _open_index(str(Path(index).resolve()))
    if corpus is not None:
        return _index_corpus(str(Path(corpus).resolve()))
    if search_url is not None:
        return _connect(search_url)
    return build_index(world_seed, WorldSize())


@functools.lru_cache(maxsize=4)
def _open_index(directory: str) -> Retriever:
    from polyturn.tools.search.engine import open_engine

    return open_engine(directory)


@functools.lru_cache(maxsize=4)
def _index_corpus(path: str) -> Retriever:
    from polyturn.tools.search.bm25 import BM25Index
    from polyturn.tools.search.corpus import read_passages

    return BM25Index.build(read_passages(path))


@functools.lru_cache(maxsize=16)
def _connect(url: str) -> Retriever:
    from polyturn.tools.search.client import ReplayRetriever, SearchClient

    if url.startswith(REPLAY):
        return ReplayRetriever(url.removeprefix(REPLAY))
    return SearchClient(url)
