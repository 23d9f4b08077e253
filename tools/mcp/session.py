"""One connection to a server, kept by a task of the background loop."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Mapping
from typing import Any

from polyturn.tools.mcp.servers import Server
from polyturn.tools.types import ToolError

_TAIL = 2000
_CLOSE_S = 10.0


class ServerFault(RuntimeError):
    """The server cannot be reached, has died, or does not answer. Nothing that a model could mend."""


class Session:
    """A connection. All methods are to be called in the background loop.

    The `mcp` package wants a connection entered and left by the same task, so one task does both.
    """

    def __init__(self, server: Server, start_timeout_s: float) -> None:
        self._server = server
        self._secrets = server.secrets
        self._start_timeout_s = start_timeout_s
        self._client: Any = None
        self._failure: str | None = None
        self._wrote = ""
        self._ready = asyncio.Event()
        self._stop = asyncio.Event()
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115  closed by _keep
        self._task = asyncio.create_task(self._keep())

    async def wait_ready(self) -> None:
        """Raises ServerFault where the connection does not come about."""
        try:
            await asyncio.wait_for(self._ready.wait(), self._start_timeout_s)
        except TimeoutError:
            await self.close()
            raise self._fault(f"no connection within {self._start_timeout_s:g} s") from None
        if self._client is None:
            raise self._fault(self._failure or "it ended at once")

    async def list_tools(self) -> list[Any]:
        """All pages of the server's list. Raises ServerFault."""
        tools: list[Any] = []
        cursor = None
        while True:
            page = await self._answer(self._client.list_tools(cursor=cursor), self._start_timeout_s)
            tools += page.tools
            cursor = page.next_cursor
            if not cursor:
                return tools

    async def call(self, name: str, arguments: Mapping[str, Any]) -> Any:
        """The server's `CallToolResult`, however long it takes.

        Raises:
            ServerFault: the server is gone, or has failed.
            ToolError: it takes the arguments for wrong.
        """
        from mcp import MCPError
        from mcp_types import INVALID_PARAMS

        if self._task.done():
            raise self._fault(self._failure or "the connection was closed")
        try:
            return await self._answer(self._client.call_tool(name, dict(arguments)), None)
        except MCPError as error:
            if error.code == INVALID_PARAMS:
                raise ToolError(self._secrets.blank(error.message)) from error
            raise self._fault(f"{type(error).__name__}: {error}") from None

    async def close(self) -> None:
        """End the connection, and the server's process where it has one."""
        self._stop.set()
        if self._client is None:
            self._task.cancel()
        done, _ = await asyncio.wait([self._task], timeout=_CLOSE_S)
        if not done:
            self._task.cancel()
            await asyncio.wait([self._task], timeout=_CLOSE_S)

    async def _answer(self, request: Any, timeout_s: float | None) -> Any:
        """The request's value, unless the connection ends first. Raises ServerFault, and the server's `MCPError`."""
        from mcp import MCPError
        from mcp_types import CONNECTION_CLOSED

        answer = asyncio.ensure_future(request)
        try:
            await asyncio.wait([answer, self._task], timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if not answer.done() and not self._task.done():
                raise self._fault(f"no answer within {timeout_s:g} s")
            if not answer.done():
                raise self._fault(self._failure or "the connection was closed")
            return answer.result()
        except MCPError as error:
            if error.code != CONNECTION_CLOSED:
                raise
            await self.close()  # there is no way back, and what a dead process wrote can be read now
            raise self._fault("the connection was closed") from None
        except (
            OSError,
            RuntimeError,
            ValueError,
        ) as error:  # of transports, streams and answers out of the protocol
            if isinstance(error, ServerFault):
                raise
            raise self._fault(_innermost(error)) from None
        finally:
            answer.cancel()

    async def _keep(self) -> None:
        from mcp import Client

        try:
            with self._errors:
                try:
                    async with Client(self._server.transport(self._errors), cache=None) as client:
                        self._client = client
                        self._ready.set()
                        await self._stop.wait()
                finally:
                    self._wrote = self._tail()
        except Exception as error:  # noqa: BLE001  whatever ends a connection is its end; who calls next is told
            self._failure = _innermost(error)
        finally:
            self._ready.set()

    def _tail(self) -> str:
        """The end of what the server wrote to standard error."""
        self._errors.flush()
        self._errors.seek(0)
        text = self._errors.read()[-_TAIL:].strip()
        return f"; it wrote: {text}" if text else ""

    def _fault(self, what: str) -> ServerFault:
        said = self._secrets.blank(f"{what}{self._wrote}")
        return ServerFault(f"MCP server {self._secrets.blank(self._server.name)!r}: {said}")


def _innermost(error: BaseException) -> str:
    """The first of a group's errors in words: groups say nothing of what is in them."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return f"{type(error).__name__}: {error}"
