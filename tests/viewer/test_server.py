"""The server of the page: who may ask it what, over real connections."""

from __future__ import annotations

import asyncio
import http.client
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from polyturn.viewer.answers import Answers
from polyturn.viewer.catalogue import Catalogue
from polyturn.viewer.server import ViewerServer, page_files
from tests.viewer.fixture import FixtureRun


@dataclass
class Served:
    port: int

    def ask(
        self, path: str, *, method: str = "GET", headers: dict[str, str] | None = None
    ) -> tuple[http.client.HTTPResponse, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        connection.request(method, path, headers=headers or {})
        response = connection.getresponse()
        body = response.read()
        connection.close()
        return response, body


@pytest.fixture(scope="module")
def served(made: FixtureRun) -> Iterator[Served]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    server = ViewerServer(Answers(Catalogue([made.folder])))
    url = asyncio.run_coroutine_threadsafe(server.start(), loop).result(30)
    yield Served(port=int(url.rstrip("/").rpartition(":")[2]))
    asyncio.run_coroutine_threadsafe(server.stop(), loop).result(30)
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def test_every_answer_keeps_other_pages_and_scripts_out(served: Served) -> None:
    for path, status in (("/", 200), ("/api/runs", 200), ("/api/run", 400), ("/nothing", 404)):
        response, _ = served.ask(path)
        assert response.status == status
        policy = response.headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy and "script-src 'self'" in policy
        assert "unsafe-inline" not in policy.partition("script-src")[2].partition(";")[0]
        assert response.headers["X-Content-Type-Options"] == "nosniff"
        assert "Access-Control-Allow-Origin" not in response.headers
    html = served.ask("/")[1].decode().lower()
    assert "<script>" not in html and "onload=" not in html


@pytest.mark.parametrize(
    "host", ["evil.example:{port}", "127.0.0.1", "evil.example", "127.0.0.1:1", "", "127.0.0.1.nip.io:{port}"]
)
def test_a_name_that_somebody_points_here_reaches_nothing(served: Served, host: str) -> None:
    response, body = served.ask("/api/runs", headers={"Host": host.format(port=served.port)})
    assert response.status in (400, 421) and b"search-" not in body


def test_it_answers_to_its_own_names(served: Served) -> None:
    for host in ("localhost", "127.0.0.1"):
        assert served.ask("/api/runs", headers={"Host": f"{host}:{served.port}"})[0].status == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
def test_it_only_reads(served: Served, method: str) -> None:
    for path in ("/api/runs", "/api/play", "/"):
        assert served.ask(path, method=method)[0].status == 405


@pytest.mark.parametrize(
    "path",
    [
        "/../server.py",
        "/..%2f..%2fserver.py",
        "/%2e%2e/server.py",
        "//etc/passwd",
        "/etc/passwd",
        "/assets/../../server.py",
        "/%00",
    ],
)
def test_nothing_but_the_page_is_served(served: Served, path: str) -> None:
    response, body = served.ask(path)
    assert response.status in (400, 404) and b"import" not in body and b"root:" not in body


def test_what_has_not_changed_is_not_sent_again(served: Served) -> None:
    response, body = served.ask("/api/runs")
    tag = response.headers["ETag"]
    again, empty = served.ask("/api/runs", headers={"If-None-Match": tag})
    assert again.status == 304 and empty == b"" and json.loads(body)["runs"]


def test_errors_are_sentences_in_json(served: Served) -> None:
    for path in (
        "/api/run?run=%ff%00",
        "/api/episodes?run=x&limit=99999999999999999999999",
        "/api/step?" + "a" * 7_000,
    ):
        response, body = served.ask(path)
        assert response.status in (400, 404) and set(json.loads(body)) == {"error"}


def test_the_page_is_shipped() -> None:
    assert "index.html" in page_files()
