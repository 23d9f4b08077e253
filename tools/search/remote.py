"""Corpora beyond a host: OpenSearch and Qdrant, behind the same batching client.

    SearchClient("http://opensearch:9200", wire=OpenSearchWire(index="wiki-18"))
    SearchClient("http://qdrant:6333", wire=QdrantWire(collection="wiki-18", encoder=encoder))

Documents carry `contents` in wiki-18's format, or `title` and `text`.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

import orjson

from polyturn.tools.search.encoder import Encoder
from polyturn.tools.search.types import Hit, SearchFailed
from polyturn.tools.search.wire import hit_of

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

    def read(self, body: bytes, *, num_queries: int) -> Sequence[tuple[Hit, ...] | SearchFailed]:
        responses = orjson.loads(body)["responses"]
        if len(responses) != num_queries:
            raise ValueError(f"{num_queries} queries were answered by {len(responses)} responses")
        return [self._read_response(response) for response in responses]

    def _read_response(self, response: Mapping[str, Any]) -> tuple[Hit, ...] | SearchFailed:
        if "error" in response:
            return SearchFailed(f"OpenSearch answered {str(response['error'])[:_SHOWN]}")
        if response.get("timed_out") or response.get("_shards", {}).get("failed"):
            return SearchFailed("OpenSearch searched a part of its shards only")
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

    def read(self, body: bytes, *, num_queries: int) -> Sequence[tuple[Hit, ...] | SearchFailed]:
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
