"""Qdrant's own logic behind a small HTTP stand-in, and OpenSearch's published `_msearch` format.

Qdrant's server is not in the package index, but its client carries the engine's logic in Python: the stand-in gives it
the REST requests. OpenSearch cannot be run here at all: a stand-in answers as its documentation shows.
"""

import contextlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from polyturn.tools.search.bm25 import BM25Index
from polyturn.tools.search.client import ClientOptions, SearchClient
from polyturn.tools.search.corpus import Passage
from polyturn.tools.search.retrieval import SearchFailed, SearchUnavailable
from polyturn.tools.search.wire import OpenSearchWire, QdrantWire

PASSAGES = [
    Passage(id="7", title="Ashford", text="Ashford lies on a river."),
    Passage(id="8", title="Mara Ek", text="Mara Ek lives in Ashford."),
]
QUICK = ClientOptions(first_wait_s=0.01, deadline_s=10, max_retries=1, max_wait_s=0.05)


@contextlib.contextmanager
def answering(respond):
    """A server that answers POST with `respond(path, headers, body)`: a status and an object."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            status, answer = respond(self.path, self.headers, body)
            data = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def in_threads(client, queries, top_k=2):
    """All queries at once, so that they share a request; an error in place of hits where one failed."""
    import asyncio

    async def ask():
        searches = (client.search_async(query, top_k) for query in queries)
        return await asyncio.gather(*searches, return_exceptions=True)

    return asyncio.run(ask())


class OpenSearch:
    """`_msearch` as documented: NDJSON in pairs, one response each, an error for a query that cannot be run."""

    def __init__(self):
        self.index = BM25Index.build(PASSAGES)
        self.requests = []

    def __call__(self, path, headers, body):
        if path != "/wiki%2F18/_msearch" or headers["Content-Type"] != "application/x-ndjson":
            return 404, {"error": {"type": "index_not_found_exception"}, "status": 404}
        self.requests.append(headers)
        assert body.endswith(b"\n")
        lines = [json.loads(line) for line in body.splitlines()]
        assert lines[::2] == [{}] * (len(lines) // 2)
        return 200, {"took": 3, "responses": [self.respond(line) for line in lines[1::2]]}

    def respond(self, search):
        query = search["query"]["multi_match"]
        assert query["fields"] == ["contents"]
        if query["query"] == "bad":
            return {
                "error": {"type": "search_phase_execution_exception", "reason": "too long"},
                "status": 400,
            }
        failed = int(query["query"] == "half")
        hits = [
            {
                "_index": "wiki",
                "_id": hit.passage_id,
                "_score": hit.score,
                "_source": {"contents": f'"{hit.title}"\n{hit.text}'},
            }
            for hit in self.index.search(query["query"], search["size"])
        ]
        shards = {"total": 2, "successful": 2 - failed, "skipped": 0, "failed": failed}
        total = {"value": len(hits), "relation": "eq"}
        return {"took": 1, "timed_out": False, "_shards": shards, "hits": {"total": total, "hits": hits}}


def test_opensearch():
    server = OpenSearch()
    wire = OpenSearchWire(index="wiki/18", username="me", password="secret")
    with answering(server) as url, SearchClient(url, wire=wire, options=QUICK) as client:
        found, nothing, bad, half = in_threads(client, ["Mara river", "zzz", "bad", "half"])
        assert list(found) == server.index.search("Mara river", 2)
        assert nothing == ()
        assert isinstance(bad, SearchFailed) and "too long" in str(bad)
        assert isinstance(half, SearchUnavailable) and "part of its shards" in str(half)
        assert len(server.requests) == 1
        assert server.requests[0]["Authorization"] == "Basic bWU6c2VjcmV0"
        assert list(client.search("Mara", 1)) == server.index.search("Mara", 1)
    with (
        answering(server) as url,
        SearchClient(url, wire=OpenSearchWire(index="none"), options=QUICK) as client,
    ):
        with pytest.raises(SearchFailed, match="HTTP 404"):
            client.search("Mara", 1)
    with pytest.raises(ValueError, match="name of an index"):
        OpenSearchWire(index="")


class Letters:
    """An encoder without a model: counts of letters."""

    dimension = 26

    def encode(self, texts):
        counts = np.array(
            [[text.lower().count(chr(97 + i)) for i in range(26)] for text in texts], np.float32
        )
        return counts / np.maximum(np.linalg.norm(counts, axis=1, keepdims=True), 1e-9)


def test_qdrant():
    qdrant = pytest.importorskip("qdrant_client")
    engine, lock = qdrant.QdrantClient(":memory:"), threading.Lock()
    models = qdrant.models
    engine.create_collection("wiki", models.VectorParams(size=26, distance=models.Distance.COSINE))
    vectors = Letters().encode([passage.title for passage in PASSAGES])
    payloads = [{"contents": f'"{PASSAGES[0].title}"\n{PASSAGES[0].text}', "id": "seven"}]
    payloads.append({"title": PASSAGES[1].title, "text": PASSAGES[1].text})
    engine.upsert(
        "wiki",
        [
            models.PointStruct(id=int(passage.id), vector=vector.tolist(), payload=payload)
            for passage, vector, payload in zip(PASSAGES, vectors, payloads, strict=True)
        ],
    )

    def respond(path, headers, body):
        if headers["api-key"] != "key":
            return 403, {"status": {"error": "Forbidden"}}
        assert path == "/collections/wiki/points/query/batch"
        requests = [models.QueryRequest.model_validate(search) for search in json.loads(body)["searches"]]
        with lock:
            results = engine.query_batch_points("wiki", requests)
        return 200, {"result": [result.model_dump(mode="json") for result in results], "status": "ok"}

    wire = QdrantWire(collection="wiki", encoder=Letters(), api_key="key")
    with answering(respond) as url, SearchClient(url, wire=wire, options=QUICK) as client:
        mara, ashford = in_threads(client, ["mara ek", "ashford"])
        assert [hit.passage_id for hit in mara] == ["8", "seven"]
        assert (mara[0].title, mara[0].text) == ("Mara Ek", "Mara Ek lives in Ashford.")
        assert mara[0].score == pytest.approx(1.0, abs=1e-3)
        assert (ashford[0].title, ashford[0].text) == ("Ashford", "Ashford lies on a river.")
        assert client.counts.num_requests == 1
    forbidden = QdrantWire(collection="wiki", encoder=Letters(), api_key="other")
    with answering(respond) as url, SearchClient(url, wire=forbidden, options=QUICK) as client:
        with pytest.raises(SearchFailed, match="Forbidden"):
            client.search("x", 1)


class Broken(Letters):
    def encode(self, texts):
        raise MemoryError("out of memory")


def test_an_encoder_that_fails_is_told_to_who_waits():
    wire = QdrantWire(collection="wiki", encoder=Broken())
    with answering(lambda *_: (200, {})) as url, SearchClient(url, wire=wire, options=QUICK) as client:
        with pytest.raises(SearchUnavailable, match="out of memory"):
            client.search("x", 1)
