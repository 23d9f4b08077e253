"""The search server: both contracts, bad requests, failures, and the command that runs it."""

import json
import re
import signal
import socket
import subprocess
import sys

import httpx
import pytest

from polyturn.tools.search import server as search_server
from polyturn.tools.search.bm25 import BM25Index
from polyturn.tools.search.corpus import PageFile, Passage, write_passages
from polyturn.tools.search.retrieval import SearchUnavailable
from polyturn.tools.search.server import SearchApp, served

PASSAGES = [
    Passage(id="0", title="Ashford", text="Ashford lies on a river."),
    Passage(id="1", title="Mara Ek", text="Mara Ek lives in Ashford."),
    Passage(id="x7", title="Ludwick", text="Ludwick is a town."),
]
INDEX = BM25Index.build(PASSAGES)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    pages = tmp_path_factory.mktemp("pages") / "pages.jsonl"
    pages.write_text('{"url": "http://a/", "contents": "A page."}\n\n{"url": "http://b/", "contents": "B"}\n')
    with served(SearchApp(INDEX, top_k=2, pages=PageFile(pages))) as url, httpx.Client(base_url=url) as http:
        yield http


def retrieve(http, **body):
    response = http.post("/retrieve", json=body)
    assert response.status_code == 200, response.text
    return response.json()["result"]


def test_with_scores_and_without(server):
    [scored] = retrieve(server, queries=["Mara"], topk=1, return_scores=True)
    assert [set(entry) for entry in scored] == [{"document", "score"}]
    assert scored[0]["score"] == pytest.approx(INDEX.search("Mara", 1)[0].score)
    [bare] = retrieve(server, queries=["Mara"], topk=1)
    assert bare == [scored[0]["document"]]
    assert bare[0]["id"] == "1"
    assert bare[0]["contents"] == '"Mara Ek"\nMara Ek lives in Ashford.'


def test_one_query_or_many(server):
    assert retrieve(server, query="Mara", topk=1) == retrieve(server, queries=["Mara"], topk=1)
    many = retrieve(server, queries=["Mara", "river", "nothing"], topk=1)
    assert [[document["id"] for document in found] for found in many] == [["1"], ["0"], []]
    assert retrieve(server, queries=[]) == []


def test_the_default_top_k(server):
    for body in ({}, {"topk": None}):
        assert len(retrieve(server, queries=["Ashford"], **body)[0]) == 2


def test_a_small_request_does_not_get_a_huge_answer(server):
    response = server.post("/retrieve", json={"queries": ["a"] * 4096, "topk": 1000})
    assert response.status_code == 413 and "ask for fewer" in response.json()["detail"]


def test_a_websocket_is_declined(server):
    upgrade = {
        "connection": "upgrade",
        "upgrade": "websocket",
        "sec-websocket-version": "13",
        "sec-websocket-key": "x" * 24,
    }
    assert server.get("/retrieve", headers=upgrade).status_code == 405


def test_half_a_request_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(search_server, "HEAD_S", 0.2)
    with served(SearchApp(INDEX, body_timeout_s=0.2)) as url:
        address = ("127.0.0.1", int(url.rpartition(":")[2]))
        head = b"POST /retrieve HTTP/1.1\r\nHost: x\r\n"
        for sent, answer in ((b"", b""), (head, b""), (head + b"Content-Length: 100\r\n\r\n{", b"408")):
            with socket.create_connection(address, timeout=20) as connection:
                connection.sendall(sent)
                assert answer in connection.recv(4096)
        with httpx.Client(base_url=url) as http:
            # A connection is as good for a second request as for the first.
            assert [http.get("/health").status_code for _ in range(2)] == [200, 200]


def test_pages_are_those_of_the_file_and_the_passages(server):
    urls = ["http://a/", "passage:1", "passage:x7", "passage:99", "http://c/", "http://b/"]
    found = server.post("/access", json={"urls": urls}).json()["result"]
    contents = [None if page is None else page["contents"] for page in found]
    assert contents == [
        "A page.",
        '"Mara Ek"\nMara Ek lives in Ashford.',
        '"Ludwick"\nLudwick is a town.',
        None,
        None,
        "B",
    ]


def test_health(server):
    assert server.get("/health").json() == {"status": "ok", "num_passages": 3}


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (b"{", 400, "not valid JSON"),
        (b"[1]", 400, "must be a JSON object"),
        (b"{}", 422, "either 'queries'"),
        (b'{"query": "a", "queries": []}', 422, "either 'queries'"),
        (b'{"queries": "a"}', 422, "'queries' must be a list of texts"),
        (b'{"queries": [1]}', 422, "'queries' must be a list of texts"),
        (b'{"query": 3}', 422, "'query' must be a text"),
        (b'{"query": "a", "topk": -1}', 422, "'topk'"),
        (b'{"query": "a", "topk": true}', 422, "'topk'"),
        (b'{"query": "a", "topk": 1e9}', 422, "'topk'"),
        (b'{"query": "a", "return_scores": "no"}', 422, "'return_scores'"),
        (json.dumps({"queries": ["a"] * 5000}).encode(), 422, "at most 4096"),
        (b'{"query": "' + b"a" * 17_000_000 + b'"}', 413, "more than"),
    ],
)
def test_bad_requests_are_told_in_a_sentence(server, body, status, words):
    response = server.post("/retrieve", content=body)
    assert response.status_code == status
    assert words in response.json()["detail"]


def test_other_paths_methods_and_urls(server):
    assert server.get("/").status_code == 404
    assert server.get("/retrieve").status_code == 405
    assert server.post("/access", json={"urls": "x"}).status_code == 422


class Down:
    def search(self, query, top_k):
        if query == "bug":
            raise KeyError("bug")
        if query == "down":
            raise SearchUnavailable("no backend")
        return INDEX.search(query, top_k)


def test_a_failing_engine_is_a_status_and_not_an_empty_result(caplog):
    with served(SearchApp(Down())) as url, httpx.Client(base_url=url) as http:
        assert http.post("/retrieve", json={"query": "down"}).status_code == 503
        failed = http.post("/retrieve", json={"query": "bug"})
        assert (failed.status_code, failed.json()["detail"]) == (500, "the search failed: KeyError: 'bug'")
        assert http.post("/retrieve", json={"query": "Mara"}).status_code == 200
        assert http.get("/health").json()["num_passages"] is None


def run(*arguments, **options):
    command = [sys.executable, "-m", "polyturn", "serve", "search", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def test_the_command_builds_an_index_serves_it_and_ends(tmp_path):
    corpus, index = tmp_path / "corpus.jsonl", tmp_path / "index"
    write_passages(corpus, PASSAGES)
    process = run("--corpus", corpus, "--index", index, "--port", 0)
    try:
        url = re.fullmatch(r"search at (http://127\.0\.0\.1:\d+)\n", process.stdout.readline())[1]
        assert retrieve(httpx.Client(base_url=url), query="Mara", topk=1)[0][0]["id"] == "1"
    finally:
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    assert "building bm25" in errors
    assert "Traceback" not in errors
    assert (index / "passages.jsonl").is_symlink(), "the corpus is not copied"
    assert [hit.passage_id for hit in BM25Index.open(index).search("Mara", 1)] == ["1"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--index", "nowhere"], "nowhere holds no index; give --corpus"),
        (["--corpus", "nowhere.jsonl"], "nowhere.jsonl: no such passage file"),
        (["--kind", "best"], "--kind is one of"),
        (["--pages", "nowhere.jsonl"], "no such page file"),
        (["--host", "192.0.2.1"], "cannot listen on 192.0.2.1"),
        (["--build-only"], "needs --index"),
    ],
)
def test_bad_options_are_told(arguments, words, tmp_path):
    from typer.testing import CliRunner

    from polyturn.cli.main import app

    result = CliRunner().invoke(app, ["serve", "search", *arguments])
    assert result.exit_code == 2
    assert words in result.stderr
