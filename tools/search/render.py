"""Search results as a model reads them: one layout for each way that they were published in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from polyturn.tools.search.types import Hit

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
