"""The tools of a search environment: what they answer, what they count, and whom a failure is told.

Heavy retrievers behind them are shared by all environments of the process.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from polyturn.envs.search.styles import ACCESS_TOOL, SearchStyle
from polyturn.envs.two_hop.env import build_index
from polyturn.envs.two_hop.world import WorldSize
from polyturn.tools.search.bm25 import BM25Index
from polyturn.tools.search.corpus import read_passages
from polyturn.tools.search.engine import open_engine
from polyturn.tools.search.retrieval import Hit, Retriever, SearchFailed, contents_of, failure, passage_url
from polyturn.tools.tool import Tool
from polyturn.tools.types import ToolError, ToolSpec

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
    return open_engine(directory)


@functools.lru_cache(maxsize=4)
def _index_corpus(path: str) -> Retriever:
    return BM25Index.build(read_passages(path))


@functools.lru_cache(maxsize=16)
def _connect(url: str) -> Retriever:
    from polyturn.tools.search.client import ReplayRetriever, SearchClient

    if url.startswith(REPLAY):
        return ReplayRetriever(url.removeprefix(REPLAY))
    return SearchClient(url)


COUNTS = (
    "num_searches",
    "num_failed_searches",
    "num_empty_searches",
    "num_repeated_searches",
    "num_invalid_actions",
    "num_thought_words",
)
NO_SEARCH_LEFT = "No search is left. Give the answer."


class SearchDesk:
    """Answers the searches of one episode at a time.

    A search that fails says so and is counted in `num_failed_searches`: it is neither empty nor an answer. A backend
    that is down raises `SearchUnavailable`, which ends the episode without a reward.
    """

    def __init__(self, *, style: SearchStyle, retriever: Retriever) -> None:
        self.style = style
        self.retriever = retriever
        self._counts: dict[str, float] = {}
        self._asked: set[str] = set()
        self._pages: dict[str, str] = {}
        self._turn = 0

    def open(self, counts: dict[str, float]) -> None:
        """Begin an episode whose counts go to `counts`."""
        counts.update(dict.fromkeys(COUNTS, 0.0))
        self._counts, self._turn = counts, 0
        self._asked, self._pages = set(), {}

    def start_turn(self, number: int) -> None:
        """Turn `number`, from 1 on, begins."""
        self._turn = number

    def count(self, name: str, amount: float = 1.0) -> None:
        """Add to a count of the episode."""
        self._counts[name] = self._counts.get(name, 0.0) + amount

    def search(self, query: str) -> str:
        """What a query finds, as the style lays it out."""
        self._admit(query)
        try:
            return self._found(self.retriever.search(query, self.style.top_k))
        except SearchFailed as error:
            raise self._failed(error) from error

    async def search_async(self, query: str) -> str:
        """As `search`, awaiting a retriever that can be awaited."""
        retriever: Any = self.retriever
        self._admit(query)
        try:
            return self._found(await retriever.search_async(query, self.style.top_k))
        except SearchFailed as error:
            raise self._failed(error) from error

    def access(self, url: str) -> str:
        """The page that a search of this episode has named."""
        if url not in self._pages:
            raise ToolError(f"No page {url!r} was found by a search.")
        return self._pages[url]

    def _admit(self, query: str) -> None:
        if self._turn > self.style.max_searches or self._counts["num_searches"] >= self.style.max_searches:
            raise ToolError(NO_SEARCH_LEFT)
        if not query.strip():
            self.count("num_empty_searches")
            raise ToolError("The query is empty.")
        self.count("num_searches")
        self.count("num_repeated_searches", float(query in self._asked))
        self._asked.add(query)

    def _found(self, hits: Sequence[Hit]) -> str:
        self.count("num_empty_searches", float(not hits))
        self._pages.update((passage_url(hit.passage_id), contents_of(hit)) for hit in hits)
        return self.style.layout(hits)

    def _failed(self, error: SearchFailed) -> ToolError:
        self.count("num_failed_searches")
        return failure(error)


def search_tools(desk: SearchDesk) -> list[Tool]:
    """The style's tools over a desk; asynchronous where its retriever is."""
    style = desk.style
    waits = hasattr(desk.retriever, "search_async")
    if style.many_queries:
        tools = [Tool(spec=_many_spec(style.tool_name), function=_many_async(desk) if waits else _many(desk))]
    else:
        spec = _spec(style.tool_name, "Search the knowledge base.", "query")
        tools = [Tool(spec=spec, function=desk.search_async if waits else desk.search)]
    if style.tags is not None and style.tags.access is not None:
        spec = _spec(ACCESS_TOOL, "Read a page that a search has named.", "url")
        tools.append(Tool(spec=spec, function=desk.access))
    return tools


def _many(desk: SearchDesk) -> Any:
    def search(query: list[str]) -> str:
        return _joined([(one, desk.search(one)) for one in query])

    return search


def _many_async(desk: SearchDesk) -> Any:
    async def search(query: list[str]) -> str:
        return _joined([(one, await desk.search_async(one)) for one in query])

    return search


def _joined(answers: Sequence[tuple[str, str]]) -> str:
    return "\n\n".join(f"Results of {query!r}:\n{found}" for query, found in answers)


def _spec(name: str, description: str, argument: str) -> ToolSpec:
    schema = {"type": "object", "properties": {argument: {"type": "string"}}, "required": [argument]}
    return ToolSpec(name=name, description=description, parameters=schema)


def _many_spec(name: str) -> ToolSpec:
    queries = {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": 4}
    schema = {"type": "object", "properties": {"query": queries}, "required": ["query"]}
    return ToolSpec(
        name=name, description="Search the knowledge base for each of the queries.", parameters=schema
    )
