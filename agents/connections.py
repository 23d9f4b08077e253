"""Connections for many requests at once: httpx's interface over aiohttp's connections.

httpx's own cost three times the processor time of a request to an engine (`benchmarks/rollout_overhead.py`).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager

import aiohttp
import httpx
from yarl import URL

KEEP_ALIVE_S = 4.0
"""An idle connection is closed after so long: before SGLang closes it, which it does after 5 s."""
_OWN_HEADERS = ("Accept", "Accept-Encoding", "Content-Type", "User-Agent")
"""Which httpx sees to."""


class ConnectionPool(httpx.AsyncBaseTransport):
    """A transport that opens a connection where none is idle. How many requests run at once is for the caller to limit.

    Raises httpx's exceptions.
    """

    def __init__(self) -> None:
        self._certificates = httpx.create_ssl_context(trust_env=False)
        self._session: aiohttp.ClientSession | None = None

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send one request. A connection whose request failed is not used again."""
        if self._session is None:
            self._session = self._open_session()
        times = request.extensions.get("timeout", {})
        with _as_httpx(request):
            response = await self._session.request(
                request.method,
                URL(str(request.url), encoded=True),
                data=await request.aread(),
                headers=request.headers.multi_items(),
                timeout=aiohttp.ClientTimeout(
                    total=None, sock_connect=times.get("connect"), sock_read=times.get("read")
                ),
                allow_redirects=False,
            )
        return httpx.Response(
            response.status, headers=list(response.raw_headers), stream=_Stream(response, request)
        )

    async def aclose(self) -> None:
        """Close the connections."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    def _open_session(self) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, ssl=self._certificates, keepalive_timeout=KEEP_ALIVE_S),
            cookie_jar=aiohttp.DummyCookieJar(),
            skip_auto_headers=_OWN_HEADERS,
            auto_decompress=False,
        )


class _Stream(httpx.AsyncByteStream):
    """A response's body; the connection is free again at its end, and closed where it was not read to the end."""

    def __init__(self, response: aiohttp.ClientResponse, request: httpx.Request) -> None:
        self._response = response
        self._request = request

    async def __aiter__(self) -> AsyncIterator[bytes]:
        with _as_httpx(self._request):
            async for chunk in self._response.content.iter_any():
                yield chunk

    async def aclose(self) -> None:
        self._response.close()


@contextmanager
def _as_httpx(request: httpx.Request) -> Iterator[None]:
    """What aiohttp raises in the block, as httpx names it."""
    try:
        yield
    except aiohttp.ConnectionTimeoutError as error:
        raise httpx.ConnectTimeout(str(error), request=request) from error
    except aiohttp.ServerTimeoutError as error:
        raise httpx.ReadTimeout(str(error), request=request) from error
    except aiohttp.ClientConnectorError as error:
        raise httpx.ConnectError(str(error), request=request) from error
    except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError) as error:
        raise httpx.ReadError(str(error), request=request) from error
    except aiohttp.ClientError as error:
        raise httpx.RemoteProtocolError(str(error), request=request) from error
