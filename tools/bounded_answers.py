"""Answers of services, bounded while they are read: a service must not decide how much memory a client takes.

Clients get these transports, so that no call site can forget the bound:

    httpx.AsyncClient(transport=BoundedTransport(httpx.AsyncHTTPTransport(), max_bytes=MAX_ANSWER_BYTES))
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import AsyncIterator, Iterator, MutableMapping
from typing import Any

import httpx

MAX_ANSWER_BYTES = 64 * 1024 * 1024
"""Of an answer of a judge, a user simulator or a search server, after decompression."""

_GZIP_OR_ZLIB = 47
"""zlib's window bits for "either header"."""


class UnreadableAnswer(httpx.RequestError):
    """A service answered more than it may, or compressed it badly. Asking again would give the same."""


class BoundedTransport(httpx.AsyncBaseTransport):
    """Another transport whose answers end with `UnreadableAnswer` beyond `max_bytes`, compressed ones included."""

    def __init__(self, inner: httpx.AsyncBaseTransport, *, max_bytes: int = MAX_ANSWER_BYTES) -> None:
        self._inner = inner
        self._max_bytes = max_bytes

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """The answer of the inner transport, decoded and bounded."""
        request.headers["accept-encoding"] = "identity"
        response = await self._inner.handle_async_request(request)
        response.stream = _BoundedStream(response, request, self._max_bytes)
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
        response.stream = _BoundedStream(response, request, self._max_bytes)
        return response

    def close(self) -> None:
        """Close the inner transport."""
        self._inner.close()


class AnswerReader:
    """Decodes the chunks of one answer and counts what comes out.

    Raises, from `read` and `finish`:
        ValueError: there is too much, or it is compressed in a way that is not gzip or deflate, or badly.
    """

    def __init__(self, *, encoding: str, max_bytes: int) -> None:
        self._left = max_bytes
        self._max_bytes = max_bytes
        self._encoding = encoding
        self._zlib = zlib.decompressobj(_GZIP_OR_ZLIB) if encoding in ("gzip", "x-gzip", "deflate") else None
        self._num_read = 0

    @classmethod
    def of(cls, headers: MutableMapping[str, str], *, max_bytes: int) -> AnswerReader:
        """For an answer with these headers, from which those go that decoding makes untrue."""
        encoding = headers.pop("content-encoding", "").strip().lower()
        if encoding:
            headers.pop("content-length", None)
        return cls(encoding=encoding, max_bytes=max_bytes)

    def read(self, chunk: bytes) -> bytes:
        """What a chunk of the wire means."""
        self._num_read += len(chunk)
        if self._zlib is None:
            if self._encoding not in ("", "identity"):
                raise ValueError(
                    f"the answer is compressed with {self._encoding[:40]!r}, which was not asked for"
                )
            return self._count(chunk)
        parts = []
        try:
            while chunk:
                if self._zlib.eof:  # gzip may consist of several members
                    self._zlib = zlib.decompressobj(_GZIP_OR_ZLIB)
                parts.append(self._count(self._zlib.decompress(chunk, self._left + 1)))
                chunk = self._zlib.unused_data if self._zlib.eof else b""
        except zlib.error as error:
            raise ValueError(f"the answer is damaged: {error}") from error
        return b"".join(parts)

    def finish(self) -> None:
        """Nothing more comes."""
        if self._zlib is not None and self._num_read and not self._zlib.eof:
            raise ValueError("the answer is damaged: it ends in the middle")

    def _count(self, decoded: bytes) -> bytes:
        self._left -= len(decoded)
        if self._left < 0:
            raise ValueError(f"the answer has more than {self._max_bytes:,} bytes")
        return decoded


class _BoundedStream(httpx.AsyncByteStream, httpx.SyncByteStream):
    """The stream of an answer, of which either half is used."""

    def __init__(self, response: httpx.Response, request: httpx.Request, max_bytes: int) -> None:
        self._inner: Any = response.stream
        self._reader = AnswerReader.of(response.headers, max_bytes=max_bytes)
        self._request = request

    async def __aiter__(self) -> AsyncIterator[bytes]:
        with self._reading():
            async for chunk in self._inner:
                yield self._reader.read(chunk)
            self._reader.finish()

    def __iter__(self) -> Iterator[bytes]:
        with self._reading():
            for chunk in self._inner:
                yield self._reader.read(chunk)
            self._reader.finish()

    async def aclose(self) -> None:
        await self._inner.aclose()

    def close(self) -> None:
        self._inner.close()

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except ValueError as error:
            raise UnreadableAnswer(str(error), request=self._request) from error
