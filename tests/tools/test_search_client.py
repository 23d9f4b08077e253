"""The search client against a real server: batches, caching, retries, deadlines, and failures that are told apart."""

import asyncio
import contextlib
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from polyturn.tools.search.bm25 import BM25Index
from polyturn.tools.search.client import ClientOptions, ReplayRetriever, SearchClient
from polyturn.tools.search.corpus import Passage
from polyturn.tools.search.retrieval import SearchFailed, SearchUnavailable, search_tool
from polyturn.tools.search.server import SearchApp, served
from polyturn.tools.toolset import Toolset
from polyturn.tools.types import ToolCall

INDEX = BM25Index.build(
    [Passage(id=str(i), title=f"Town {i}", text=f"Town {i} lies on river number{i}.") for i in range(300)]
)
QUICK = ClientOptions(first_wait_s=0.01, deadline_s=10)


class Faulty(SearchApp):
    """A server that first answers `faults`, one a request: a status, seconds to wait, or a body."""

    def __init__(self, faults=()):
        super().__init__(INDEX, num_threads=2)
        self.faults = list(faults)
        self.bodies = []

    async def __call__(self, scope, receive, send):
        sent = []

        async def keep():
            message = await receive()
            sent.append(message.get("body", b""))
            return message

        fault = self.faults.pop(0) if self.faults else None
        if isinstance(fault, float):
            await asyncio.sleep(fault)
        if isinstance(fault, (int, bytes)):
            status, body = (fault, b"{}") if isinstance(fault, int) else (200, fault)
            await keep()
            await send({"type": "http.response.start", "status": status, "headers": []})
            await send({"type": "http.response.body", "body": body})
        else:
            await super().__call__(scope, keep, send)
        if body := b"".join(sent):
            self.bodies.append(json.loads(body))


@contextlib.contextmanager
def client_of(app, **options):
    with served(app) as url, SearchClient(url, options=replace(QUICK, **options)) as client:
        yield client


def test_answers_are_those_of_the_index():
    with client_of(Faulty()) as client:
        assert list(client.search("number7", 2)) == INDEX.search("number7", 2)
        assert client.search("nowhere", 2) == ()


def test_searches_from_many_loops_and_threads_meet_in_batches():
    app = Faulty()

    async def ask(client, first):
        queries = [f"number{first + i}" for i in range(50)]
        hits = await asyncio.gather(*(client.search_async(query, 1) for query in queries))
        return [hit.title for (hit,) in hits]

    with client_of(app, max_wait_s=0.05) as client, ThreadPoolExecutor(6) as threads:
        waits = [threads.submit(lambda n=n: asyncio.run(ask(client, 50 * n))) for n in range(5)]
        waits.append(threads.submit(lambda: [client.search("number290", 1)[0].title]))
        titles = [title for wait in waits for title in wait.result()]
    assert titles[:250] == [f"Town {i}" for i in range(250)]
    assert titles[250] == "Town 290"
    sizes = [len(body["queries"]) for body in app.bodies]
    assert sum(sizes) == 251
    assert max(sizes) <= 64
    assert len(sizes) < 50, "batched"


def test_equal_searches_fly_once_and_land_in_the_cache():
    app = Faulty([0.1])

    async def ask(client):
        return await asyncio.gather(*(client.search_async("number1", 1) for _ in range(100)))

    with client_of(app, cache_size=2) as client:
        answers = asyncio.run(ask(client))
        assert len(set(answers)) == 1
        assert client.counts.num_joined == 99
        client.search("number1", 1)
        assert client.counts.num_cached == 1
        for other in ("number2", "number3"):
            client.search(other, 1)
        client.search("number1", 1)
        assert client.counts.num_requests == 4, "the oldest answer left the cache of 2"


@pytest.mark.parametrize("faults", [[500], [503, 502, 500]])
def test_servers_that_stumble_are_asked_again(faults):
    with client_of(Faulty(faults)) as client:
        assert client.search("number7", 1)[0].title == "Town 7"
        assert client.counts.num_retries == len(faults)


def test_a_server_that_keeps_failing_fails_the_search_and_then_opens_the_breaker():
    app = Faulty([500] * 100)
    with client_of(app, breaker_threshold=4, deadline_s=1.0, breaker_cooldown_s=0.5) as client:
        with pytest.raises(SearchUnavailable, match="HTTP 500"):
            client.search("number7", 1)
        assert len(app.bodies) == 4
        app.faults.clear()
        started = time.monotonic()
        assert client.search("number7", 1)[0].title == "Town 7", "what is asked meanwhile waits for the trial"
        assert time.monotonic() - started > 0.3 and len(app.bodies) == 5


def test_who_waits_for_an_open_breaker_does_so_to_the_deadline():
    with client_of(Faulty([500] * 4), breaker_threshold=4, deadline_s=0.6, breaker_cooldown_s=60) as client:
        with pytest.raises(SearchUnavailable, match="HTTP 500"):
            client.search("number7", 1)
        with pytest.raises(
            SearchUnavailable, match=r"no answer within 0\.6 s; .* nothing is asked for a while"
        ):
            client.search("number7", 1)


def test_a_refused_query_is_not_asked_again_and_harms_no_other():
    async def ask(client):
        searches = [client.search_async(query, 1) for query in ("number1", "x" * 200_000, "number2")]
        return await asyncio.gather(*searches, return_exceptions=True)

    with client_of(Faulty(), max_wait_s=0.05) as client:
        first, refused, second = asyncio.run(ask(client))
        assert (first[0].title, second[0].title) == ("Town 1", "Town 2")
        assert isinstance(refused, SearchFailed)
        assert "HTTP 422" in str(refused)
        assert "at most 10000 characters" in str(refused)
        assert client.counts.num_retries == 0


def test_the_deadline_is_total():
    with client_of(Faulty([2.0]), deadline_s=0.3) as client:
        started = time.monotonic()
        with pytest.raises(SearchUnavailable, match=r"within 0\.3 s"):
            client.search("number7", 1)
        assert time.monotonic() - started < 10


def test_a_closed_port_is_unavailable():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with SearchClient(f"http://127.0.0.1:{port}/retrieve", options=replace(QUICK, max_retries=2)) as client:
        with pytest.raises(SearchUnavailable, match="ConnectError"):
            client.search("x", 1)
        assert client.counts.num_requests == 3


@pytest.mark.parametrize("body", [b"<html>", b"{}", b'{"result": []}', b'{"result": [[{"id": 1}]]}'])
def test_a_server_of_another_kind_is_unavailable_and_never_empty(body):
    with client_of(Faulty([body])) as client, pytest.raises(SearchUnavailable, match="as a search server"):
        client.search("number7", 1)


def test_documents_may_stand_bare():
    bare = b'{"result": [[{"id": 3, "contents": "\\"A\\"\\nB"}]]}'
    with client_of(Faulty([bare])) as client:
        [hit] = client.search("number7", 1)
        assert (hit.passage_id, hit.title, hit.text, hit.score) == ("3", "A", "B", 0.0)


def test_who_waits_is_told_when_the_client_closes():
    before = set(threading.enumerate())
    with served(Faulty([2.0])) as url:
        client = SearchClient(url, options=QUICK)
        with ThreadPoolExecutor(1) as threads:
            waiting = threads.submit(client.search, "number7", 1)
            while not client.counts.num_requests:
                time.sleep(0.01)
            client.close()
            with pytest.raises(SearchUnavailable, match="closed"):
                waiting.result(10)
        with pytest.raises(SearchUnavailable, match="closed"):
            client.search("number8", 1)
    assert set(threading.enumerate()) <= before


def test_recorded_answers_are_replayed(tmp_path):
    path = tmp_path / "answers.jsonl"
    with client_of(Faulty([500, 500, 500, 500]), record=path, breaker_threshold=99) as client:
        with pytest.raises(SearchUnavailable):
            client.search("number5", 2)
        hits = client.search("number5", 2)
        client.search("nowhere", 2)
    replay = ReplayRetriever(path)
    assert replay.search("number5", 2) == hits
    assert replay.search("nowhere", 2) == ()
    with pytest.raises(SearchUnavailable, match="no answer to 'number5' with top_k 3"):
        replay.search("number5", 3)
    path.write_text("{}\n")
    with pytest.raises(ValueError, match=r"answers\.jsonl:1: not a recorded answer"):
        ReplayRetriever(path)


def test_the_tool_waits_for_a_client_and_tells_what_failed():
    with client_of(Faulty([200, 404])) as client:
        tools = Toolset([search_tool(client, top_k=1)])
        call = ToolCall(id="1", name="search", arguments={"query": "number7"})
        with pytest.raises(SearchUnavailable):
            asyncio.run(tools.call_async(call))
        failed = asyncio.run(tools.call_async(call))
        assert not failed.ok
        assert failed.content.startswith("The search failed: HTTP 404")
        assert asyncio.run(tools.call_async(call)).content.startswith("Doc 1(Title: Town 7)")


def test_a_url_is_one():
    with pytest.raises(ValueError, match="begins with http"):
        SearchClient("localhost:8000")
