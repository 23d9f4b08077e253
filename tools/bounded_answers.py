"""Answers of services, bounded while they are read: a service must not decide how much memory a client takes.

Clients get these transports, so that no call site can forget the bound:

    httpx.AsyncClient(transport=BoundedTransport(httpx.AsyncHTTPTransport(), max_bytes=MAX_ANSWER_BYTES))
"""

from __future__ import annotations

import zlib
from collections.abc import AsyncIterator, Iterator, MutableMapping

import httpx

MAX_ANSWER_BYTES = 64 * 1024 * 1024
"""Of an answer of a judge, a user simulator or a search server, after decompression."""

_GZIP_OR_ZLIB = 47
"""zlib's window bits for "either header"."""


class AnswerTooLarge(httpx.RequestError):
    """A service answered more than it may. Asking again would give the same."""


class BoundedTransport(httpx.AsyncBaseTransport):
    """Another transport whose answers end with `AnswerTooLarge` beyond `max_bytes`, compressed ones included."""

    def __init__(self, inner: httpx.AsyncBaseTransport, *, max_bytes: int = MAX_ANSWER_BYTES) -> None:
        self._inner = inner
        self._max_bytes = max_bytes

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """The answer of the inner transport, decoded and bounded."""
        request.headers["accept-encoding"] = "identity"
        response = await self._inner.handle_async_request(request)
        reader = AnswerReader.of(response.headers, max_bytes=self._max_bytes)
        assert isinstance(response.stream, httpx.AsyncByteStream)
        response.stream = _AsyncStream(response.stream, reader, request)
        return response

    async def aclose(self) -> None:
        """Close the inner transport."""
        await self._inner.aclose()


class BoundedSyncTransport(httpx.BaseTransport):
    """As `BoundedTransport`, for `httpx.Client`."""

    def __init__(self, inner: httpx.BaseTransport, *, max_bytes: int = MAX_ANSWER_BYTES) -> None:
        self._inner = inner
        self._max_bytes = max_bytes

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """The answer of the inner transport, decoded and bounded."""
        request.headers["accept-encoding"] = "identity"
        response = self._inner.handle_request(request)
        reader = AnswerReader.of(response.headers, max_bytes=self._max_bytes)
        assert isinstance(response.stream, httpx.SyncByteStream)
        response.stream = _SyncStream(response.stream, reader, request)
        return response

    def close(self) -> None:
        """Close the inner transport."""
        self._inner.close()


class AnswerReader:
    """Decodes the chunks of one answer and counts what comes out.

    Raises, from `read`:
        ValueError: there is too much, or it is compressed in a way that is not gzip or deflate, or badly.
    """

    def __init__(self, *, encoding: str, max_bytes: int) -> None:
        self._left = max_bytes
        self._max_bytes = max_bytes
        self._encoding = encoding
        self._zlib = zlib.decompressobj(_GZIP_OR_ZLIB) if encoding in ("gzip", "x-gzip", "deflate") else None

    @classmethod
    def of(cls, headers: MutableMapping[str, str], *, max_bytes: int) -> AnswerReader:
        """For an answer with these headers, from which those go that decoding makes untrue."""
        encoding = headers.pop("content-encoding", "").strip().lower()
        if encoding:
            headers.pop("content-length", None)
        return cls(encoding=encoding, max_bytes=max_bytes)

    def read(self, chunk: bytes) -> bytes:
        """What a chunk of the wire means."""
        if self._zlib is not None:
            try:
                chunk = self._zlib.decompress(chunk, self._left + 1)
            except zlib.error as error:
                raise ValueError(f"the answer is damaged: {error}") from error
        elif self._encoding not in ("", "identity"):
            raise ValueError(
                f"the answer is compressed with {self._encoding[:40]!r}, which was not asked for"
            )
        self._left -= len(chunk)
        if self._left < 0:
            raise ValueError(f"the answer has more than {self._max_bytes:,} bytes")
        return chunk


class _AsyncStream(httpx.AsyncByteStream):
    def __init__(self, inner: httpx.AsyncByteStream, reader: AnswerReader, request: httpx.Request) -> None:
        self._inner, self._reader, self._request = inner, reader, request

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for chunk in self._inner:
            try:
                yield self._reader.read(chunk)
            except ValueError as error:
                raise AnswerTooLarge(str(error), request=self._request) from error

    async def aclose(self) -> None:
        await self._inner.aclose()


class _SyncStream(httpx.SyncByteStream):
    def __init__(self, inner: httpx.SyncByteStream, reader: AnswerReader, request: httpx.Request) -> None:
        self._inner, self._reader, self._request = inner, reader, request

    def __iter__(self) -> Iterator[bytes]:
        for chunk in self._inner:
            try:
                yield self._reader.read(chunk)
            except ValueError as error:
                raise AnswerTooLarge(str(error), request=self._request) from error

    def close(self) -> None:
        self._inner.close()
