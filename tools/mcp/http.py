"""Bounded answers for the `mcp` package's HTTP client, which is that of httpx2."""

from __future__ import annotations

from collections.abc import AsyncIterator

import httpx2

from polyturn.tools.bounded_answers import MAX_ANSWER_BYTES, AnswerReader


class BoundedTransport(httpx2.AsyncHTTPTransport):
    """A transport each of whose answers ends with an error beyond `MAX_ANSWER_BYTES`, while it is read."""

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """The answer, decoded and bounded."""
        request.headers["accept-encoding"] = "identity"
        response = await super().handle_async_request(request)
        reader = AnswerReader.of(response.headers, max_bytes=MAX_ANSWER_BYTES)
        assert isinstance(response.stream, httpx2.AsyncByteStream)
        response.stream = _Stream(response.stream, reader)
        return response


class _Stream(httpx2.AsyncByteStream):
    def __init__(self, inner: httpx2.AsyncByteStream, reader: AnswerReader) -> None:
        self._inner, self._reader = inner, reader

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for chunk in self._inner:
            yield self._reader.read(chunk)
        self._reader.finish()

    async def aclose(self) -> None:
        await self._inner.aclose()
