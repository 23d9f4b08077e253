"""HTTP connections for many requests at once.

httpx's own pool looks at every connection, several times over, whenever a request begins or ends: with 64 requests in
flight that was half of the client's CPU time. Here each connection is a pool of one, and the idle ones are a stack.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable

import httpx


class StackedConnections(httpx.AsyncBaseTransport):
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
