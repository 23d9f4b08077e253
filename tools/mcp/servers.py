"""Where a server is, and the secrets that it needs: these are in no text that anybody reads."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TextIO

from polyturn.tools.secrets import (
    Secrets,
    public_url,
    secrets_in_arguments,
    secrets_in_mapping,
    secrets_in_url,
)

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
