"""The wire format of search servers: Search-R1's `/retrieve`, and ASearcher's `/access`.

A request is `{"queries": ["...", ...], "topk": 3, "return_scores": true}`; some clients send one `query`. The answer is
`{"result": [[{"document": {"id", "contents"}, "score"}, ...], ...]}`, one list for each query; without scores the
documents stand bare. `contents` is `"Title"\\ntext`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import orjson

from polyturn.tools.search.render import contents_of, passage_url
from polyturn.tools.search.types import Hit, SearchFailed

MAX_QUERIES = 4096
MAX_TOP_K = 1000
MAX_QUERY_CHARS = 10_000
MAX_HITS = 16_384
"""Of one answer, over all its queries: a small request must not ask for a huge answer."""


class Wire(Protocol):
    """What a kind of server is asked over HTTP (POST), and how its answers are read."""

    path: str
    """Behind the server's url."""
    headers: Mapping[str, str]
    is_slow: bool
    """Whether `write` computes for so long that it belongs in a thread."""

    def write(self, queries: Sequence[str], top_k: int) -> bytes:
        """The body of a request."""
        ...

    def read(self, body: bytes, *, num_queries: int) -> Sequence[tuple[Hit, ...] | SearchFailed]:
        """One entry for each query: its hits, or why there are none.

        Raises:
            ValueError, KeyError, TypeError: the body is no such answer.
        """
        ...


class SearchR1Wire:
    """Search-R1's `/retrieve`, asked for scores."""

    path = "/retrieve"
    headers: Mapping[str, str] = {"Content-Type": "application/json"}
    is_slow = False

    def write(self, queries: Sequence[str], top_k: int) -> bytes:
        return orjson.dumps({"queries": list(queries), "topk": top_k, "return_scores": True})

    def read(self, body: bytes, *, num_queries: int) -> Sequence[tuple[Hit, ...] | SearchFailed]:
        """With or without scores; a score that is not there is 0."""
        result = orjson.loads(body)["result"]
        if not isinstance(result, list) or len(result) != num_queries:
            raise ValueError(f"{num_queries} queries were answered by {str(result)[:100]}")
        return [tuple(_read_entry(entry) for entry in entries) for entries in result]


class BadRequest(ValueError):
    """A request that cannot be answered: the message says what is wrong with it."""

    def __init__(self, message: str, *, status: int = 422) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, kw_only=True, slots=True)
class RetrieveRequest:
    """What a client asks for."""

    queries: tuple[str, ...]
    top_k: int
    return_scores: bool = False


def read_request(body: bytes, *, default_top_k: int) -> RetrieveRequest:
    """The request in a body.

    Raises:
        BadRequest: 400 for a body that is no JSON object, 422 for wrong fields.
    """
    fields = _read_object(body)
    if ("queries" in fields) == ("query" in fields):
        raise BadRequest("give either 'queries', a list of texts, or 'query', a text")
    name = "queries" if "queries" in fields else "query"
    queries = fields[name]
    if name == "query" and isinstance(queries, str):
        queries = [queries]
    if not isinstance(queries, list) or not all(isinstance(query, str) for query in queries):
        raise BadRequest(f"'{name}' must be {'a list of texts' if name == 'queries' else 'a text'}")
    if len(queries) > MAX_QUERIES:
        raise BadRequest(f"at most {MAX_QUERIES} queries may be asked at once, not {len(queries)}")
    if any(len(query) > MAX_QUERY_CHARS for query in queries):
        raise BadRequest(f"a query may have at most {MAX_QUERY_CHARS} characters")
    top_k = fields.get("topk")
    if top_k is None:
        top_k = default_top_k
    if isinstance(top_k, bool) or not isinstance(top_k, int) or not 1 <= top_k <= MAX_TOP_K:
        raise BadRequest(f"'topk' must be a whole number from 1 to {MAX_TOP_K}, or null for the default")
    if len(queries) * top_k > MAX_HITS:
        raise BadRequest(
            f"{len(queries)} queries of {top_k} passages each are more than {MAX_HITS} passages; ask for fewer at once",
            status=413,
        )
    return_scores = fields.get("return_scores", False)
    if not isinstance(return_scores, bool):
        raise BadRequest("'return_scores' must be true or false")
    return RetrieveRequest(queries=tuple(queries), top_k=top_k, return_scores=return_scores)


def write_answer(results: Sequence[Sequence[Hit]], *, return_scores: bool) -> bytes:
    """The body of an answer."""
    return orjson.dumps({"result": [[_entry(hit, return_scores) for hit in hits] for hits in results]})


def read_urls(body: bytes) -> list[str]:
    """The urls of a request for pages. Raises `BadRequest`."""
    fields = _read_object(body)
    urls = fields.get("urls")
    if not isinstance(urls, list) or not all(isinstance(url, str) for url in urls):
        raise BadRequest("'urls' must be a list of texts")
    if len(urls) > MAX_QUERIES:
        raise BadRequest(f"at most {MAX_QUERIES} pages may be asked for at once, not {len(urls)}")
    return urls


def write_pages(urls: Sequence[str], pages: Sequence[str | None]) -> bytes:
    """The body of an answer with pages; null for a page that is not there."""
    found = zip(urls, pages, strict=True)
    return orjson.dumps(
        {"result": [None if page is None else {"url": url, "contents": page} for url, page in found]}
    )


def _read_object(body: bytes) -> dict[str, Any]:
    try:
        fields = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise BadRequest(f"the body is not valid JSON: {error}", status=400) from error
    if not isinstance(fields, dict):
        raise BadRequest(f"the body must be a JSON object, not a {type(fields).__name__}", status=400)
    return fields


def _entry(hit: Hit, with_score: bool) -> dict[str, Any]:
    document = {"id": hit.passage_id, "contents": contents_of(hit), "url": passage_url(hit.passage_id)}
    return {"document": document, "score": hit.score} if with_score else document


def hit_of(document: Mapping[str, Any], *, passage_id: Any, score: float) -> Hit:
    """The hit that a stored document is: its `contents` in wiki-18's format, or its `title` and `text`.

    Raises:
        KeyError: it has neither.
    """
    if "contents" in document:
        title, _, text = document["contents"].partition("\n")
        title = title.strip('"')
    else:
        title, text = document.get("title", ""), document["text"]
    return Hit(passage_id=str(passage_id), title=title, text=text, score=float(score))


def _read_entry(entry: Mapping[str, Any]) -> Hit:
    document = entry.get("document", entry)
    score = entry.get("score", 0.0) if entry is not document else 0.0
    return hit_of(document, passage_id=document.get("id", ""), score=score)
