"""A real server that answers chat requests with what it is given, as providers do."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One answer of the server."""

    body: Any = None
    """JSON, or bytes as they are."""
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    events: Sequence[Any] | None = None
    """In place of a body a stream: chunks as JSON, or bytes as they are; a number is a pause in seconds."""
    breaks_off: bool = False
    """Whether the connection is cut behind what is sent."""


def message(content: Any = None, *, finish_reason: Any = "stop", usage: Any = None, **fields: Any) -> Answer:
    """A plain answer."""
    choice = {"index": 0, "message": {"role": "assistant", "content": content, **fields}}
    return Answer(body={"choices": [{**choice, "finish_reason": finish_reason}], "usage": usage})


def delta(finish_reason: Any = None, **fields: Any) -> dict[str, Any]:
    """A chunk of a stream."""
    return {"choices": [{"index": 0, "delta": fields, "finish_reason": finish_reason}]}


DONE = b"data: [DONE]\n\n"


@dataclass
class ChatServer:
    """What was asked, and where."""

    url: str
    requests: list[dict[str, Any]] = field(default_factory=list)
    headers: list[Mapping[str, str]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)


@asynccontextmanager
async def chat_server(*answers: Answer) -> AsyncIterator[ChatServer]:
    """Gives `answers` in their order, the last one for ever."""
    remaining = list(answers)

    async def handle(request: web.Request) -> web.StreamResponse:
        server.requests.append(await request.json())
        server.headers.append(dict(request.headers))
        server.paths.append(request.path_qs)
        answer = remaining.pop(0) if len(remaining) > 1 else remaining[0]
        if answer.events is not None:
            return await _stream(request, answer)
        body = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
        return web.Response(
            body=body, status=answer.status, headers=answer.headers, content_type="application/json"
        )

    app = web.Application()
    app.router.add_post("/{path:.*}", handle)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0, shutdown_timeout=0.1)
    await site.start()
    server = ChatServer(url=f"http://127.0.0.1:{runner.addresses[0][1]}/v1")
    try:
        yield server
    finally:
        await runner.cleanup()


async def _stream(request: web.Request, answer: Answer) -> web.StreamResponse:
    response = web.StreamResponse(
        status=answer.status, headers={"Content-Type": "text/event-stream; charset=utf-8", **answer.headers}
    )
    await response.prepare(request)
    for event in answer.events or ():
        if isinstance(event, float):
            await asyncio.sleep(event)
            continue
        data = event if isinstance(event, bytes) else b"data: " + json.dumps(event).encode() + b"\n\n"
        await response.write(data)
    if answer.breaks_off:
        assert request.transport is not None
        request.transport.close()
    return response
