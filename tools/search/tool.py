"""The search tool."""

from __future__ import annotations

from polyturn.tools.decorator import Tool
from polyturn.tools.search.bm25 import BM25Index
from polyturn.tools.search.render import render_hits
from polyturn.tools.types import ToolSpec

SEARCH_SPEC = ToolSpec(
    name="search",
    description="Search the knowledge base.",
    parameters={"type": "object", "properties": {"query": {"type": "string"}}, "required": ["query"]},
)


def search_tool(index: BM25Index, *, top_k: int = 3) -> Tool:
    """A tool that answers `search(query)` with the `top_k` best passages of `index`."""

    def search(query: str) -> str:
        return render_hits(index.search(query, top_k))

    return Tool(spec=SEARCH_SPEC, function=search)
