"""Answers that are larger than they may be, compressed and not, against a real server."""

from __future__ import annotations

import asyncio
import gzip
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest

from polyturn.tools.bounded_answers import BoundedSyncTransport, BoundedTransport, UnreadableAnswer
from polyturn.tools.search.client import ClientOptions, SearchClient
from polyturn.tools.search.retrieval import SearchUnavailable

LIMIT = 100_000
BOMB = gzip.compress(b"0" * 200_000_000, compresslevel=9)
ANSWERS = {
    "/small": (b"hello", None),
    "/gzip": (gzip.compress(b"hello"), "gzip"),
    "/members": (gzip.compress(b"hel") + gzip.compress(b"lo"), "gzip"),
    "/short": (gzip.compress(b"hello" * 1000)[:-9], "gzip"),
    "/just": (b"x" * LIMIT, None),
    "/large": (b"x" * (LIMIT + 1), None),
    "/bomb": (BOMB, "gzip"),
    "/retrieve": (BOMB, "gzip"),
    "/brotli": (b"hello", "br"),
    "/cut": (gzip.compress(b"hello" * 1000)[:-30] + b"x" * 40, "gzip"),
}


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body, encoding = ANSWERS[self.path]
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        if encoding:
            self.send_header("content-encoding", encoding)
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self.do_GET()

    def log_message(self, *_: object) -> None:
        """Says nothing."""


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()


def get(url: str, path: str) -> tuple[bytes, bytes]:
    with httpx.Client(transport=BoundedSyncTransport(httpx.HTTPTransport(), max_bytes=LIMIT)) as client:
        sync = client.get(url + path).content

    async def get_async() -> bytes:
        transport = BoundedTransport(httpx.AsyncHTTPTransport(), max_bytes=LIMIT)
        async with httpx.AsyncClient(transport=transport) as client:
            return (await client.get(url + path)).content

    return sync, asyncio.run(get_async())


@pytest.mark.parametrize(
    ("path", "body"),
    [("/small", b"hello"), ("/gzip", b"hello"), ("/members", b"hello"), ("/just", b"x" * LIMIT)],
)
def test_what_fits_comes_whole(url: str, path: str, body: bytes) -> None:
    assert get(url, path) == (body, body)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/large", "more than 100,000 bytes"),
        ("/bomb", "more than 100,000 bytes"),
        ("/brotli", "compressed with 'br'"),
        ("/cut", "damaged"),
        ("/short", "ends in the middle"),
    ],
)
def test_what_does_not_fit_is_an_error(url: str, path: str, words: str) -> None:
    with pytest.raises(UnreadableAnswer, match=words):
        get(url, path)


def test_a_search_that_is_answered_by_a_bomb_fails(url: str) -> None:
    with SearchClient(url, options=ClientOptions(deadline_s=20)) as client:
        with pytest.raises(SearchUnavailable, match="more than 67,108,864 bytes"):
            client.search("query", 3)
