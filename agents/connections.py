"""Connections to engines, for many requests at once.

aiohttp directly: with httpx a request cost the client four times the processor time, of which its own connections were
more than half. Only what answers to `post_json` and to samples of load is here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import aiohttp
import httpx

KEEP_ALIVE_S = 4.0
"""An idle connection is closed after so long: before SGLang closes it, which it does after 5 s."""
CONNECT_S = 30.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What came back, whatever its status."""

    status_code: int
    headers: Mapping[str, str]
    content: bytes

    @property
    def text(self) -> str:
        """The content as text; what is not UTF-8 becomes U+FFFD."""
        return self.content.decode(errors="replace")

    def json(self) -> Any:
        """The content as JSON, which may hold NaN. Raises `ValueError`."""
        return json.loads(self.content)


class EngineClient:
    """Opens a connection where none is idle: how many requests run at once is for the caller to limit.

    Requests raise httpx's exceptions, as other clients do. One event loop only.
    """

    def __init__(self, *, timeout_s: float, max_bytes: int) -> None:
        """An answer has at most `max_bytes`, and `timeout_s` seconds for each part to come."""
        self._max_bytes = max_bytes
        self._timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S, sock_read=timeout_s)
        self._session: aiohttp.ClientSession | None = None

    async def post(
        self, url: str, *, content: bytes = b"", headers: Mapping[str, str] | None = None
    ) -> Answer:
        """The answer to `content`. Raises `httpx.RequestError`."""
        return await self._request("POST", url, content=content, headers=headers, timeout=self._timeout)

    async def get(self, url: str, *, timeout: float | None = None) -> Answer:
        """The answer, within `timeout` seconds in all. Raises `httpx.RequestError`."""
        limit = self._timeout if timeout is None else aiohttp.ClientTimeout(total=timeout)
        return await self._request("GET", url, content=None, headers=None, timeout=limit)

    async def aclose(self) -> None:
        """Close the connections."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def _request(
        self,
        method: str,
        url: str,
        *,
        content: bytes | None,
        headers: Mapping[str, str] | None,
        timeout: aiohttp.ClientTimeout,
    ) -> Answer:
        if self._session is None:
            self._session = self._open_session()
        with _as_httpx():
            async with self._session.request(
                method, url, data=content, headers=headers, timeout=timeout, allow_redirects=False
            ) as response:
                body = await self._read(response)
        return Answer(status_code=response.status, headers=response.headers, content=body)

    async def _read(self, response: aiohttp.ClientResponse) -> bytes:
        """The whole body, which is never taken in beyond `max_bytes`."""
        encoding = response.headers.get("Content-Encoding", "identity")
        if encoding != "identity":
            raise httpx.RequestError(
                f"the answer is compressed with {encoding[:40]!r}, which was not asked for"
            )
        parts, left = [], self._max_bytes
        async for chunk in response.content.iter_any():
            left -= len(chunk)
            if left < 0:
                raise httpx.RequestError(f"the answer has more than {self._max_bytes:,} bytes")
            parts.append(chunk)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _open_session(self) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                limit=0, ssl=httpx.create_ssl_context(trust_env=False), keepalive_timeout=KEEP_ALIVE_S
            ),
            cookie_jar=aiohttp.DummyCookieJar(),
            headers={"Accept-Encoding": "identity"},
            auto_decompress=False,
        )


@contextmanager
def _as_httpx() -> Iterator[None]:
    """What aiohttp raises in the block, as httpx names it."""
    try:
        yield
    except aiohttp.ConnectionTimeoutError as error:
        raise httpx.ConnectTimeout(str(error)) from error
    except TimeoutError as error:
        raise httpx.ReadTimeout(str(error)) from error
    except aiohttp.ClientConnectorError as error:
        raise httpx.ConnectError(str(error)) from error
    except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError) as error:
        raise httpx.ReadError(str(error)) from error
    except aiohttp.InvalidURL as error:
        raise httpx.UnsupportedProtocol(str(error)) from error
    except aiohttp.ClientError as error:
        raise httpx.RemoteProtocolError(str(error)) from error
