"""Connections for many requests: used again, never shared at once, and dropped when they break."""

from __future__ import annotations

import asyncio

import httpx
import pytest

from polyturn.agents.connections import EngineClient
from polyturn.rollout.factory import open_client


class Server:
    """Answers every request with the number of its connection; `gate` holds answers back."""

    def __init__(self):
        self.num_connections = 0
        self.gate = asyncio.Event()
        self.gate.set()
        self.hang_up = False
        self.answer = None
        self.waiting = 0
        self.writers = []

    async def __aenter__(self):
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_):
        self._server.close()

    async def _serve(self, reader, writer):
        self.num_connections += 1
        self.writers.append(writer)
        number = str(self.num_connections).encode()
        try:
            while await reader.readuntil(b"\r\n\r\n"):
                self.waiting += 1
                await self.gate.wait()
                if self.hang_up:
                    break
                if self.answer is not None:
                    writer.write(self.answer)
                    continue
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(number), number))
                await writer.drain()
        except asyncio.IncompleteReadError:
            pass
        writer.close()


async def test_a_connection_is_used_again():
    async with Server() as server, open_client(timeout_s=5) as client:
        answers = [(await client.get(server.url)).text for _ in range(10)]
    assert answers == ["1"] * 10


async def test_requests_at_once_have_connections_of_their_own():
    async with Server() as server, open_client(timeout_s=5) as client:
        server.gate.clear()
        requests = [asyncio.create_task(client.get(server.url)) for _ in range(50)]
        while server.waiting < 50:
            await asyncio.sleep(0.01)
        server.gate.set()
        first = [(await request).text for request in requests]
        again = await asyncio.gather(*(client.get(server.url) for _ in range(50)))
        assert len(set(first)) == 50
        assert server.num_connections == 50
        assert {answer.text for answer in again} == set(first)


async def test_a_broken_connection_is_an_error_once():
    async with Server() as server, open_client(timeout_s=5) as client:
        assert (await client.get(server.url)).text == "1"
        server.hang_up = True
        with pytest.raises(httpx.TransportError):
            await client.post(server.url)
        server.hang_up = False
        assert (await client.get(server.url)).text == "2"


async def test_an_idle_connection_that_the_server_closed_is_replaced():
    async with Server() as server, open_client(timeout_s=5) as client:
        assert (await client.get(server.url)).text == "1"
        for writer in server.writers:
            writer.close()
        await asyncio.sleep(0.05)
        assert (await client.get(server.url)).text == "2"


async def test_a_cancelled_request_does_not_leave_its_answer_to_the_next():
    async with Server() as server, open_client(timeout_s=5) as client:
        server.gate.clear()
        request = asyncio.create_task(client.get(server.url))
        while not server.waiting:
            await asyncio.sleep(0.01)
        request.cancel()
        with pytest.raises(asyncio.CancelledError):
            await request
        server.gate.set()
        assert (await client.get(server.url)).text == "2"


async def test_an_answer_is_taken_in_up_to_its_bound_and_no_further():
    async with Server() as server, EngineClient(timeout_s=5, max_bytes=1000) as client:
        server.answer = b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n" + b"x" * 1000
        assert len((await client.post(server.url)).content) == 1000
        # Without an end: it would never be over.
        server.answer = b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 1001
        with pytest.raises(httpx.RequestError, match="more than 1,000 bytes") as caught:
            await client.post(server.url)
        assert not isinstance(caught.value, httpx.TransportError), "asking again would give the same"


async def test_what_was_not_asked_for_is_refused_or_left_to_the_caller():
    async with Server() as server, EngineClient(timeout_s=5, max_bytes=1000) as client:
        server.answer = b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 2\r\n\r\nxx"
        with pytest.raises(httpx.RequestError, match="compressed with 'gzip'"):
            await client.post(server.url)
        server.answer = b"HTTP/1.1 307 No\r\nLocation: http://127.0.0.1:9/\r\nContent-Length: 2\r\n\r\n{}"
        answer = await client.post(server.url)
        assert (answer.status_code, answer.json()) == (307, {})


async def test_failures_have_the_names_of_httpx():
    async with Server() as server, EngineClient(timeout_s=0.05, max_bytes=1000) as client:
        with pytest.raises(httpx.ConnectError):
            await client.get("http://127.0.0.1:9/")
        with pytest.raises(httpx.UnsupportedProtocol):
            await client.get("nowhere")
        server.gate.clear()
        with pytest.raises(httpx.ReadTimeout):
            await client.post(server.url)
        with pytest.raises(httpx.ReadTimeout):
            await client.get(server.url, timeout=0.05)
        server.gate.set()
        server.answer = b"?!\r\n\r\n"
        with pytest.raises(httpx.TransportError):
            await client.post(server.url)
