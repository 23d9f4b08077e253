"""Tools that servers of the Model Context Protocol offer, over stdio and streamable HTTP.

How the servers are reached, and their tools as tools of an environment, over a connection that a background event
loop keeps.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import json
import os
import sys
import tempfile
import threading
from collections.abc import AsyncIterator, Collection, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TextIO, TypeVar

from polyturn.tools.closing import Closing
from polyturn.tools.secrets import (
    Secrets,
    public_url,
    secrets_in_arguments,
    secrets_in_mapping,
    secrets_in_url,
)
from polyturn.tools.tool import Tool, ToolLimits
from polyturn.tools.types import ToolError, ToolSpec

__all__ = ["HttpServer", "McpTools", "StdioServer"]

_GUARD = Path(__file__).with_name("guard.py")


class Server(Protocol):
    """A server to connect to."""

    @property
    def name(self) -> str:
        """For messages; no secrets."""
        ...

    @property
    def secrets(self) -> Secrets:
        """What must not be read."""
        ...

    def transport(self, errors: TextIO) -> contextlib.AbstractAsyncContextManager[Any]:
        """The `mcp` package's transport; `errors` takes what a process of the server writes to standard error."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class StdioServer:
    """A server that is started as a process and spoken to over its standard input and output.

    It gets `environment` beside PATH, HOME and the like, and nothing else of this process's environment.
    """

    command: Sequence[str]
    """Program and arguments; no shell reads them."""
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Variables such as keys. Values of those that are secrets by name or look (see `tools/secrets.py`) are blanked out
    in whatever the server says."""
    secret_names: Collection[str] = ()
    """Further variables whose values are secrets."""
    working_directory: str | Path | None = None

    def __post_init__(self) -> None:
        if isinstance(self.command, str) or not self.command:
            raise ValueError('command is a list such as ["python", "server.py"], not a line for a shell')

    @property
    def name(self) -> str:
        return Path(self.command[0]).name + "".join(f" {Path(part).name}" for part in self.command[1:2])

    @property
    def secrets(self) -> Secrets:
        declared = [(name, self.environment[name]) for name in self.secret_names if name in self.environment]
        return Secrets(
            [*declared, *secrets_in_mapping(self.environment), *secrets_in_arguments(self.command)]
        )

    def transport(self, errors: TextIO) -> contextlib.AbstractAsyncContextManager[Any]:
        from mcp.client.stdio import StdioServerParameters, stdio_client

        # The guard ends the server where this process is killed and cannot.
        arguments = ["-I", "-S", str(_GUARD), *self.command]
        parameters = StdioServerParameters(
            command=sys.executable, args=arguments, env=dict(self.environment), cwd=self.working_directory
        )
        return stdio_client(parameters, errlog=errors)


@dataclass(frozen=True, kw_only=True, slots=True)
class HttpServer:
    """A server that is reached over streamable HTTP."""

    url: str
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Sent with every request. Values of those that are secrets by name or look are blanked out in whatever the server
    says."""
    secret_names: Collection[str] = ()
    """Further headers whose values are secrets."""

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"url must begin with http:// or https://, not {self.url!r}")

    @property
    def name(self) -> str:
        return public_url(self.url)

    @property
    def secrets(self) -> Secrets:
        declared = [(name, self.headers[name]) for name in self.secret_names if name in self.headers]
        return Secrets([*declared, *secrets_in_mapping(self.headers), *secrets_in_url(self.url)])

    @contextlib.asynccontextmanager
    async def transport(self, errors: TextIO) -> AsyncIterator[Any]:
        import httpx2
        from mcp.client.streamable_http import streamable_http_client

        from polyturn.tools.mcp.http import BoundedTransport

        del errors
        timeout = httpx2.Timeout(30.0, read=None)  # how long an answer may take is the caller's to say
        async with httpx2.AsyncClient(
            headers=dict(self.headers), timeout=timeout, transport=BoundedTransport()
        ) as client:
            async with streamable_http_client(self.url, http_client=client) as streams:
                yield streams


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


Value = TypeVar("Value")


class BackgroundLoop:
    """An event loop that runs until the process ends."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="polyturn mcp", daemon=True)
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, Value]) -> Value:
        """Run `coroutine` there and wait for its value in this thread."""
        if threading.current_thread() is self._thread:
            coroutine.close()
            raise RuntimeError("the background loop cannot wait for itself")
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    async def await_(self, coroutine: Coroutine[Any, Any, Value]) -> Value:
        """Run `coroutine` there and await its value in the running loop, whichever that is."""
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(coroutine, self._loop))


def background_loop() -> BackgroundLoop:
    """This process's one."""
    return _background_loop(os.getpid())


@functools.lru_cache(maxsize=1)
def _background_loop(owner: int) -> BackgroundLoop:
    del owner  # a fork has no threads of its parent's
    return BackgroundLoop()


class McpTools(Closing):
    """The tools of one server, over one session at a time.

        with McpTools(StdioServer(command=["python", "server.py"])) as server:
            env = MyEnvironment(tools=server.tools)

    The session lives in a background event loop. The tools are `async`, and can be called from any event loop and, in
    an environment's `step`, from none. What the server calls an error is a `ToolError`, which the model reads; a call
    that takes too long is a timed-out result; a server that is gone or fails is a `ServerFault`, and ends the episode.

    Secrets of the server (of its environment, headers, arguments and url) are blanked out in descriptions, results and
    errors.
    """

    def __init__(
        self,
        server: Server,
        *,
        only: Collection[str] | None = None,
        prefix: str = "",
        call_timeout_s: float = 30.0,
        start_timeout_s: float = 60.0,
        max_output_chars: int | None = 20_000,
    ) -> None:
        """Connect and list the tools.

        Args:
            server: A `StdioServer` or an `HttpServer`.
            only: Names of the tools to take; None takes all.
            prefix: Put before the tools' names, to tell servers apart.
            call_timeout_s: For one call; the model is told.
            start_timeout_s: For connecting and for listing.
            max_output_chars: The model is shown so much of a result.

        Raises:
            MissingMcp: the `mcp` package is not installed.
            ServerFault: the server cannot be reached.
            ValueError: a tool of `only` that the server does not have.
        """
        _require_mcp()
        self._server = server
        self._secrets = server.secrets
        self._start_timeout_s = start_timeout_s
        self._limits = ToolLimits(timeout_s=call_timeout_s, max_output_chars=max_output_chars)
        self._loop = background_loop()
        self._session: Session | None = self._loop.run(self._connect())
        try:
            listed = {tool.name: tool for tool in self._loop.run(self._session.list_tools())}
            if missing := sorted(set(only or ()) - set(listed)):
                raise ValueError(
                    f"the server has no tool {missing[0]!r}; it has {', '.join(listed) or 'none'}"
                )
            self.tools = tuple(
                self._tool(tool, prefix) for name, tool in listed.items() if only is None or name in only
            )
        except BaseException:
            self.close()
            raise

    tools: tuple[Tool, ...]
    """For `ToolEnv(tools=...)` or a `Toolset`."""

    def renew(self) -> None:
        """Begin a new session, with a new process where the server is one. The tools stay the same.

        Raises:
            ServerFault: the server cannot be reached.
        """
        self.close()
        self._session = self._loop.run(self._connect())

    def close(self) -> None:
        """End the session and the server's process. Closing again does nothing."""
        session, self._session = self._session, None
        if session is not None:
            self._loop.run(session.close())

    async def _connect(self) -> Session:
        session = Session(self._server, self._start_timeout_s)
        await session.wait_ready()
        return session

    def _tool(self, listed: Any, prefix: str) -> Tool:
        name = listed.name
        spec = ToolSpec(
            name=f"{prefix}{name}",
            description=self._secrets.blank(inspect.cleandoc(listed.description or "")),
            parameters=self._secrets.blank_tree({"type": "object", "properties": {}, **listed.input_schema}),
        )

        async def call(**arguments: Any) -> str:
            return await self._call(name, arguments)

        return Tool(spec=spec, function=call, limits=self._limits)

    async def _call(self, name: str, arguments: Mapping[str, Any]) -> str:
        if self._session is None:
            raise ServerFault(
                f"the session with MCP server {self._secrets.blank(self._server.name)!r} is closed"
            )
        result = await self._loop.await_(self._session.call(name, arguments))
        text = self._secrets.blank(text_of(result))
        if result.is_error:
            raise ToolError(text or f"The tool {name!r} failed, and did not say why.")
        return text


def text_of(result: Any) -> str:
    """A `CallToolResult` in words: its texts; what is no text is named; structured content where there is no other."""
    parts = [_text_of_block(block) for block in result.content]
    if not parts and result.structured_content is not None:
        return json.dumps(result.structured_content, ensure_ascii=False)
    return "\n".join(parts)


def _text_of_block(block: Any) -> str:
    if block.type == "text":
        return str(block.text)
    if block.type == "resource":
        text = getattr(block.resource, "text", None)
        return str(text) if text is not None else f"[resource {block.resource.uri}]"
    if block.type == "resource_link":
        return f"[resource {block.uri}]"
    return f"[{block.type}, {getattr(block, 'mime_type', 'unknown type')}, not shown]"


def _require_mcp() -> None:
    try:
        import mcp  # noqa: F401  whether it is there
        from mcp import Client  # noqa: F401  whether it is version 2
    except ImportError as error:
        raise MissingMcp(
            f"MCP servers need the package 'mcp', version 2 ({error}); install it with: pip install 'polyturn[mcp]'"
        ) from error


class MissingMcp(ImportError, ValueError):
    """The `mcp` package cannot be imported. The text says how to install it."""
