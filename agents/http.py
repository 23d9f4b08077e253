"""Requests to an inference server, tried again while that may help, and the connections for many of them at once.

httpx's own pool looks at every connection, several times over, whenever a request begins or ends: with 64 requests in
flight that was half of the client's CPU time. Here each connection is a pool of one, and the idle ones are a stack.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

import httpx
import orjson

from polyturn.agents.policy import EngineUnavailable, PolicyFault
from polyturn.tools.retries import Retries, Tries, asked_wait_s, may_pass, transport_problem
from polyturn.tools.secrets import public_url

_MAX_SHOWN = 300


async def post_json(
    client: httpx.AsyncClient,
    url: str,
    payload: Mapping[str, Any],
    *,
    retries: Retries,
    headers: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """The JSON object that `url` answers to `payload`, which may hold arrays, within the deadline of `retries`.

    Broken connections, statuses from 500 on, and 408, 425 and 429 are tried again, after the time that the server asks
    for.

    Raises:
        EngineUnavailable: it failed at every try, or took too long.
        PolicyFault: it was refused (another 4xx), or its answer is no JSON object.
    """
    tries, shown_url = Tries(retries), public_url(url)
    body = orjson.dumps(dict(payload), option=orjson.OPT_SERIALIZE_NUMPY)
    headers = {"Content-Type": "application/json", **(headers or {})}
    while True:
        problem, asked_s, cause = "", None, None
        deadline = asyncio.timeout(tries.left_s)
        try:
            async with deadline:
                response = await client.post(url, content=body, headers=headers)
        except (httpx.ReadTimeout, httpx.WriteTimeout, httpx.PoolTimeout, TimeoutError) as error:
            message = f"{shown_url}: no answer in time ({type(error).__name__})"
            raise EngineUnavailable(message, is_gone=False) from error
        except (httpx.TransportError, OSError) as error:
            problem, cause = transport_problem(error), error
        except httpx.RequestError as error:
            raise PolicyFault(f"{shown_url}: {error}") from error
        else:
            if response.status_code < 400:
                return _json_object(shown_url, response)
            problem = f"HTTP {response.status_code}: {response.text[:_MAX_SHOWN]}"
            if not may_pass(response.status_code):
                raise PolicyFault(f"{shown_url}: {problem}")
            asked_s = asked_wait_s(response.headers)
        wait_s = tries.next_wait_s(asked_s)
        if wait_s is None:
            message = f"{shown_url}: {tries.over(problem, asked_s)}"
            raise EngineUnavailable(message, is_gone=cause is not None) from cause
        await asyncio.sleep(wait_s)


def _json_object(url: str, response: httpx.Response) -> dict[str, Any]:
    try:
        answer = _from_json(response)
    except ValueError as error:
        raise PolicyFault(f"{url}: the answer is not JSON: {response.text[:_MAX_SHOWN]}") from error
    if not isinstance(answer, dict):
        raise PolicyFault(f"{url}: the answer is a {type(answer).__name__}, not an object")
    return answer


def _from_json(response: httpx.Response) -> Any:
    try:
        return orjson.loads(response.content)
    except ValueError:
        return response.json()  # which knows NaN, and encodings other than UTF-8


class ConnectionPool(httpx.AsyncBaseTransport):
    """A transport that uses the connection that became idle last, or opens a new one when none is idle.

    How many requests run at once is for the caller to limit.
    """

    def __init__(self) -> None:
        # Shared: reading the certificates anew for every connection would take longer than a request.
        self._certificates = httpx.create_ssl_context(trust_env=False)
        self._idle: list[httpx.AsyncHTTPTransport] = []

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send one request. A connection whose request failed is not used again."""
        connection = self._idle.pop() if self._idle else self._connect()
        try:
            response = await connection.handle_async_request(request)
        except BaseException:
            await connection.aclose()
            raise
        assert isinstance(response.stream, httpx.AsyncByteStream)
        response.stream = _Stream(response.stream, lambda: self._idle.append(connection))
        return response

    async def aclose(self) -> None:
        """Close the idle connections."""
        while self._idle:
            await self._idle.pop().aclose()

    def _connect(self) -> httpx.AsyncHTTPTransport:
        one = httpx.Limits(max_connections=1, max_keepalive_connections=1)
        return httpx.AsyncHTTPTransport(verify=self._certificates, limits=one, trust_env=False)


class _Stream(httpx.AsyncByteStream):
    """A response's body; gives the connection back when it is closed."""

    def __init__(self, stream: httpx.AsyncByteStream, release: Callable[[], None]) -> None:
        self._stream = stream
        self._release = release

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for chunk in self._stream:
            yield chunk

    async def aclose(self) -> None:
        await self._stream.aclose()
        self._release()
