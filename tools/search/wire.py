"""The wire formats of search servers: Search-R1's `/retrieve`, ASearcher's `/access`, OpenSearch and Qdrant.

A request to `/retrieve` is `{"queries": ["...", ...], "topk": 3, "return_scores": true}`; some clients send one
`query`. The answer is `{"result": [[{"document": {"id", "contents"}, "score"}, ...], ...]}`, one list for each query;
without scores the documents stand bare. `contents` is `"Title"\\ntext`.

Corpora beyond a host stand behind the same batching client:

    SearchClient("http://opensearch:9200", wire=OpenSearchWire(index="wiki-18"))
    SearchClient("http://qdrant:6333", wire=QdrantWire(collection="wiki-18", encoder=encoder))

Their documents carry `contents` in wiki-18's format, or `title` and `text`.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol
from urllib.parse import quote

import orjson

from polyturn.tools.search.dense import Encoder
from polyturn.tools.search.retrieval import Hit, SearchFailed, SearchUnavailable, contents_of, passage_url

NoHits = SearchFailed | SearchUnavailable
"""Why a query of an answer has no hits."""
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

    def read(self, body: bytes, *, num_queries: int) -> Sequence[tuple[Hit, ...] | NoHits]:
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

    def read(self, body: bytes, *, num_queries: int) -> Sequence[tuple[Hit, ...] | NoHits]:
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


_SHOWN = 200


class OpenSearchWire:
    """`POST /{index}/_msearch`: one request for all queries of a batch, each ranked by OpenSearch's BM25.

    Elasticsearch speaks the same.
    """

    is_slow = False

    def __init__(
        self,
        *,
        index: str,
        fields: Sequence[str] = ("contents",),
        username: str | None = None,
        password: str | None = None,
    ) -> None:
        """
        Args:
            index: Its name.
            fields: Where the words of a query are looked for; `title^2` counts a field twice.
            username: For basic authentication; None sends none.
            password: To that name.
        """
        if not index or not fields:
            raise ValueError("OpenSearch needs the name of an index and one field at least")
        self.path = f"/{quote(index, safe='')}/_msearch"
        self.headers: Mapping[str, str] = {"Content-Type": "application/x-ndjson"}
        if username is not None:
            token = base64.b64encode(f"{username}:{password or ''}".encode()).decode()
            self.headers = {**self.headers, "Authorization": f"Basic {token}"}
        self._fields = list(fields)

    def write(self, queries: Sequence[str], top_k: int) -> bytes:
        lines: list[bytes] = []
        for query in queries:
            wanted = {"multi_match": {"query": query, "fields": self._fields}}
            lines += [b"{}", orjson.dumps({"query": wanted, "size": top_k})]
        return b"\n".join(lines) + b"\n"

    def read(self, body: bytes, *, num_queries: int) -> Sequence[tuple[Hit, ...] | NoHits]:
        responses = orjson.loads(body)["responses"]
        if len(responses) != num_queries:
            raise ValueError(f"{num_queries} queries were answered by {len(responses)} responses")
        return [self._read_response(response) for response in responses]

    def _read_response(self, response: Mapping[str, Any]) -> tuple[Hit, ...] | NoHits:
        if "error" in response:
            return SearchFailed(f"OpenSearch answered {str(response['error'])[:_SHOWN]}")
        if response.get("timed_out") or response.get("_shards", {}).get("failed"):
            return SearchUnavailable("OpenSearch searched a part of its shards only")
        return tuple(
            hit_of(hit["_source"], passage_id=hit["_id"], score=hit["_score"])
            for hit in response["hits"]["hits"]
        )


class QdrantWire:
    """`POST /collections/{collection}/points/query/batch`: nearest points to the encoded queries."""

    is_slow = True

    def __init__(
        self,
        *,
        collection: str,
        encoder: Encoder,
        query_prefix: str = "",
        vector_name: str | None = None,
        api_key: str | None = None,
    ) -> None:
        """
        Args:
            collection: Its name.
            encoder: Of the queries; the one that the points were made with.
            query_prefix: `query: ` for E5.
            vector_name: Which of a point's vectors; None for the unnamed one.
            api_key: Sent with each request; None sends none.
        """
        if not collection:
            raise ValueError("Qdrant needs the name of a collection")
        self.path = f"/collections/{quote(collection, safe='')}/points/query/batch"
        self.headers: Mapping[str, str] = {"Content-Type": "application/json"}
        if api_key is not None:
            self.headers = {**self.headers, "api-key": api_key}
        self._encoder = encoder
        self._prefix = query_prefix
        self._using = {} if vector_name is None else {"using": vector_name}

    def write(self, queries: Sequence[str], top_k: int) -> bytes:
        vectors = self._encoder.encode([self._prefix + query for query in queries])
        searches = [
            {"query": vector.tolist(), "limit": top_k, "with_payload": True, **self._using}
            for vector in vectors
        ]
        return orjson.dumps({"searches": searches})

    def read(self, body: bytes, *, num_queries: int) -> Sequence[tuple[Hit, ...] | NoHits]:
        results = orjson.loads(body)["result"]
        if len(results) != num_queries:
            raise ValueError(f"{num_queries} queries were answered by {len(results)} results")
        return [
            tuple(
                hit_of(
                    point["payload"], passage_id=point["payload"].get("id", point["id"]), score=point["score"]
                )
                for point in result["points"]
            )
            for result in results
        ]
