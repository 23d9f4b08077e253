"""Where a server is, and the secrets that it needs: these are in no text that anybody reads."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TextIO

_GUARD = Path(__file__).with_name("guard.py")
_SHORTEST_SECRET = 4
"""Values below it, such as "1", are no secrets, and hiding them would garble texts."""


class Server(Protocol):
    """A server to connect to."""

    @property
    def name(self) -> str:
        """For messages; no secrets."""
        ...

    @property
    def secrets(self) -> Mapping[str, str]:
        """What must not be read, by name."""
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
    """Variables such as keys. Their values are blanked out in whatever the server says."""
    working_directory: str | Path | None = None

    def __post_init__(self) -> None:
        if isinstance(self.command, str) or not self.command:
            raise ValueError('command is a list such as ["python", "server.py"], not a line for a shell')

    @property
    def name(self) -> str:
        return Path(self.command[0]).name + "".join(f" {Path(part).name}" for part in self.command[1:2])

    @property
    def secrets(self) -> Mapping[str, str]:
        return self.environment

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
    """Sent with every request. Their values are blanked out in whatever the server says."""

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"url must begin with http:// or https://, not {self.url!r}")

    @property
    def name(self) -> str:
        return self.url.partition("?")[0].rpartition("@")[2]

    @property
    def secrets(self) -> Mapping[str, str]:
        return self.headers

    @contextlib.asynccontextmanager
    async def transport(self, errors: TextIO) -> AsyncIterator[Any]:
        import httpx2
        from mcp.client.streamable_http import streamable_http_client

        del errors
        timeout = httpx2.Timeout(30.0, read=None)  # how long an answer may take is the caller's to say
        async with httpx2.AsyncClient(headers=dict(self.headers), timeout=timeout) as client:
            async with streamable_http_client(self.url, http_client=client) as streams:
                yield streams


def blank_secrets(text: str, secrets: Mapping[str, str]) -> str:
    """`text` with each secret's value replaced by its name."""
    for name, value in sorted(secrets.items(), key=lambda item: -len(item[1])):
        if len(value) >= _SHORTEST_SECRET:
            text = text.replace(value, f"[{name}]")
    return text
