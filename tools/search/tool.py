"""The search tool."""

from __future__ import annotations

from typing import Any

from polyturn.tools.decorator import Tool
from polyturn.tools.search.render import render_hits
from polyturn.tools.search.types import Retriever, SearchFailed
from polyturn.tools.types import ToolError, ToolSpec

SEARCH_SPEC = ToolSpec(
    name="search",
    description="Search the knowledge base.",
    parameters={"type": "object", "properties": {"query": {"type": "string"}}, "required": ["query"]},
)


def search_tool(retriever: Retriever, *, top_k: int = 3) -> Tool:
    """A tool that answers `search(query)` with the `top_k` best passages; asynchronous where the retriever is.

    A search that fails is told to the model. A backend that is down raises `SearchUnavailable`, which ends the episode.
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
