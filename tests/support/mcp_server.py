"""A small MCP server for the tests: `python mcp_server.py stdio`, or `python mcp_server.py http PORT`."""

from __future__ import annotations

import asyncio
import os
import signal
import sys

from mcp.server.mcpserver import MCPServer
from mcp.server.mcpserver.exceptions import ToolError

server = MCPServer("notebook", log_level="CRITICAL")
notes: list[str] = []


@server.tool()
def add(a: int, b: int) -> int:
    """Add two numbers.

    Then tell the sum.
    """
    return a + b


@server.tool()
def note(text: str) -> str:
    """Keep a note."""
    notes.append(text)
    return " / ".join(notes)


@server.tool()
def locked(door: str) -> str:
    """Open a door that is locked."""
    raise ToolError(f"the {door} door is locked")


@server.tool()
def secret() -> str:
    """Tell the key."""
    return (
        f"the key is {os.environ.get('NOTEBOOK_KEY')}, and PWD_KEY is {os.environ.get('POLYTURN_TEST_OTHER')}"
    )


@server.tool()
def environment() -> str:
    """Tell all variables and arguments, in several spellings."""
    import base64
    import json

    texts = [f"{name}={value}" for name, value in os.environ.items()] + sys.argv
    encoded = [base64.b64encode(value.encode()).decode() for value in os.environ.values()]
    return "\n".join([*texts, json.dumps(texts), json.dumps(json.dumps(texts)), *encoded])


@server.tool(description=f"Needs {os.environ.get('NOTEBOOK_KEY')}.")
def keyed(key: str = os.environ.get("NOTEBOOK_KEY", "")) -> str:
    """Described below the decorator."""
    return key


@server.tool()
async def wait(seconds: float) -> str:
    """Wait."""
    await asyncio.sleep(seconds)
    return "done"


@server.tool()
def long(length: int) -> str:
    """Say much."""
    return "x" * length


@server.tool()
def die() -> str:
    """End the server in the middle of a call."""
    print(f"dying with {os.environ.get('NOTEBOOK_KEY')}", file=sys.stderr, flush=True)
    os._exit(3)


@server.tool()
def pid() -> int:
    """The server's process id."""
    return os.getpid()


@server.tool()
async def stay() -> int:
    """From now on ignore that the input ends and polite signals, as a bad server does."""
    import threading
    import time

    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=lambda: time.sleep(600)).start()
    return os.getpid()


if __name__ == "__main__":
    if sys.argv[1] == "stdio":
        server.run("stdio")
    else:
        server.run("streamable-http", host="127.0.0.1", port=int(sys.argv[2]))
