"""A server's tools as tools of an environment."""

from __future__ import annotations

import inspect
import json
from collections.abc import Collection, Mapping
from types import TracebackType
from typing import Any, Self

from polyturn.tools.decorator import Tool
from polyturn.tools.limits import ToolLimits
from polyturn.tools.mcp.loop import background_loop
from polyturn.tools.mcp.servers import Server
from polyturn.tools.mcp.session import ServerFault, Session
from polyturn.tools.types import ToolError, ToolSpec


class McpTools:
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

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

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
