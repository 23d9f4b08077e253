"""What every search backend has in common: hits, how they are shown, how a search fails, and the tool over them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from polyturn.tools.tool import Tool
from polyturn.tools.types import ToolError, ToolSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class Hit:
    """One result."""

    passage_id: str
    title: str
    text: str
    score: float


class Retriever(Protocol):
    """Finds passages. Safe in several threads at once."""

    def search(self, query: str, top_k: int) -> Sequence[Hit]:
        """At most `top_k` hits, best first; empty only when nothing matches.

        Raises:
            SearchFailed: this query is refused.
            SearchUnavailable: there is no answer, whatever the query.
        """
        ...


class SearchFailed(RuntimeError):
    """The backend works, and refused this query: the model may mend it."""


class SearchUnavailable(RuntimeError):
    """The backend did not answer, or not as it should: infrastructure, and never a result."""


NOTHING_FOUND = "Nothing was found."
MAX_ASEARCHER_CHARS = 5000


def render_hits(hits: Sequence[Hit]) -> str:
    """`Doc 1(Title: T) text`, one a line."""
    lines = (f"Doc {i}(Title: {hit.title}) {hit.text}" for i, hit in enumerate(hits, start=1))
    return "\n".join(lines).strip() or NOTHING_FOUND


def render_quoted(hits: Sequence[Hit]) -> str:
    """`Doc 1(Title: "T") text`, one a line: wiki-18 keeps titles in quotes, and Search-R1 shows them so."""
    lines = (f'Doc {i}(Title: "{hit.title}") {hit.text}' for i, hit in enumerate(hits, start=1))
    return "\n".join(lines).strip() or NOTHING_FOUND


def render_numbered(hits: Sequence[Hit]) -> str:
    """`(1)T text`, one a line, as R1-Searcher numbers them."""
    return "\n".join(f"({i}){hit.title} {hit.text}" for i, hit in enumerate(hits, start=1)) or NOTHING_FOUND


def render_linked(hits: Sequence[Hit]) -> str:
    """`[Doc 1](url):` and the contents on the next lines, cut as ASearcher cuts them; the url is `passage_url`'s."""
    documents = (
        f"[Doc {i}]({passage_url(hit.passage_id)}):\n{contents_of(hit)[:MAX_ASEARCHER_CHARS]}"
        for i, hit in enumerate(hits, start=1)
    )
    return "\n\n".join(documents) or NOTHING_FOUND


def render_contents(hits: Sequence[Hit]) -> str:
    """The contents alone, with a blank line between."""
    return "\n\n".join(contents_of(hit) for hit in hits) or NOTHING_FOUND


Layout = Callable[[Sequence[Hit]], str]
LAYOUTS: Mapping[str, Layout] = {
    "plain": render_hits,
    "quoted": render_quoted,
    "numbered": render_numbered,
    "linked": render_linked,
    "contents": render_contents,
}


def contents_of(hit: Hit) -> str:
    """Title and text as wiki-18 joins them."""
    return f'"{hit.title}"\n{hit.text}'


def passage_url(passage_id: str) -> str:
    """The url under which a passage of an index is read whole."""
    return f"passage:{passage_id}"


SEARCH_SPEC = ToolSpec(
    name="search",
    description="Search the knowledge base.",
    parameters={"type": "object", "properties": {"query": {"type": "string"}}, "required": ["query"]},
)


def search_tool(retriever: Retriever, *, top_k: int = 3) -> Tool:
    """A tool that answers `search(query)` with the `top_k` best passages; asynchronous where the retriever is.

    A query that is refused is told to the model. A backend that fails raises `SearchUnavailable`, which ends the
    episode without a reward.
    """

    def search(query: str) -> str:
        try:
            return render_hits(retriever.search(query, top_k))
        except SearchFailed as error:
            raise failure(error) from error

    async def search_async(query: str) -> str:
        awaited: Any = retriever
        try:
            return render_hits(await awaited.search_async(query, top_k))
        except SearchFailed as error:
            raise failure(error) from error

    waits = hasattr(retriever, "search_async")
    return Tool(spec=SEARCH_SPEC, function=search_async if waits else search)


def failure(error: SearchFailed) -> ToolError:
    """What the model is told of a search that failed: not that nothing was found."""
    return ToolError(f"The search failed: {error}. Nothing is known of what it would have found.")
