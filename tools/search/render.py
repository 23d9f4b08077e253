"""Search results as a model reads them."""

from __future__ import annotations

from collections.abc import Sequence

from polyturn.tools.search.bm25 import Hit

NOTHING_FOUND = "Nothing was found."


def render_hits(hits: Sequence[Hit]) -> str:
    """`Doc 1(Title: T) text`, one a line, as Search-R1 renders them (arXiv 2503.09516)."""
    if not hits:
        return NOTHING_FOUND
    return "\n".join(f"Doc {i}(Title: {hit.title}) {hit.text}" for i, hit in enumerate(hits, start=1)).strip()
