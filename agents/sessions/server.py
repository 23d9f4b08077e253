"""The endpoint of all sessions of a process: any program that speaks a known protocol plays an episode through it.

http://127.0.0.1:PORT/sessions/SESSION/v1/chat/completions   OpenAI chat completions
                                      /v1/responses          OpenAI responses
                                      /v1/messages           Anthropic messages
                                      /v1/models
http://127.0.0.1:PORT/episodes                               takes up an episode that is offered to programs outside
http://127.0.0.1:PORT/sessions/SESSION/end                   says what it was worth
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import math
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Protocol, Self, runtime_checkable
from urllib.parse import quote

import orjson
from aiohttp import web

from polyturn.agents.episode import failure_text
from polyturn.agents.policy import PolicyFault
from polyturn.agents.sessions.anthropic_messages import (
    PING,
    KeptThreads,
    anthropic_error,
    anthropic_stream_error,
    read_messages,
)
from polyturn.agents.sessions.fields import Body, read_number, read_object
from polyturn.agents.sessions.offers import Offers, Worth
from polyturn.agents.sessions.openai_chat import openai_error, openai_stream_error, read_chat
from polyturn.agents.sessions.openai_responses import KeptResponses, read_response, responses_stream_error
from polyturn.agents.sessions.requests import (
    Completer,
    Completion,
    CompletionRequest,
    RequestRefused,
    SessionAddress,
)

logger = logging.getLogger(__name__)

MAX_BODY_BYTES = 32 << 20
KEEP_ALIVE_S = 10.0
"""A client that waits for a stream hears so often that its answer is being made."""
MODEL = "policy"
"""The name of the model; clients may call it as they like."""
_BACKLOG = 4096
"""Connections that wait to be taken in: all programs of a step may come at once."""
_SHUTDOWN_S = 5.0
_MAX_SOCKET_PATH = 107


class Exchange(Protocol):
    """A request of a client, and how its answer is said in the client's protocol."""

    @property
    def request(self) -> CompletionRequest: ...

    @property
    def is_stream(self) -> bool: ...

    def answer(self, completion: Completion, *, created_s: int) -> dict[str, Any]:
        """The answer as one object. `created_s`: seconds since 1970."""
        ...

    def events(self, completion: Completion, *, created_s: int) -> Iterator[bytes]:
        """The answer as server-sent events."""
        ...


@runtime_checkable
class CountsTokens(Protocol):
    """A completer that says how many tokens a request comes to."""

    async def count_tokens(self, request: CompletionRequest) -> int:
        """The tokens of the prompt. Raises `RequestRefused`."""
        ...


@dataclass(kw_only=True, slots=True, eq=False)
class _Session:
    completer: Completer
    key: bytes
    running: set[asyncio.Task[Completion]] = field(default_factory=set)
    kept_responses: KeptResponses = field(default_factory=KeptResponses)
    kept_threads: KeptThreads = field(default_factory=KeptThreads)
    is_closed: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class _Wire:
    """A protocol: how its requests are read, and what else than answers its streams say."""

    read: Callable[[Body, _Session, bool], Exchange]
    """Of a body, a session, and whether the client has asked before. Raises `RequestRefused`."""
    stream_error: Callable[..., bytes]
    """The event of a sentence, and `status`, that ends a stream which has begun."""
    keep_alive: bytes = b": keep-alive\n\n"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Problem:
    """Why there is no answer."""

    message: str
    status: int
    headers: Mapping[str, str] = field(default_factory=dict)


def _read_chat(body: Body, session: _Session, is_retry: bool) -> Exchange:
    del session
    return read_chat(body, is_retry=is_retry)


def _read_response(body: Body, session: _Session, is_retry: bool) -> Exchange:
    return read_response(body, session.kept_responses, is_retry=is_retry)


def _read_messages(body: Body, session: _Session, is_retry: bool) -> Exchange:
    return read_messages(body, session.kept_threads, is_retry=is_retry)


_CHAT = _Wire(read=_read_chat, stream_error=openai_stream_error)
_RESPONSES = _Wire(read=_read_response, stream_error=responses_stream_error)
_MESSAGES = _Wire(read=_read_messages, stream_error=anthropic_stream_error, keep_alive=PING)


class SessionServer:
    """An `Endpoint` on a free port of the loopback interface, and on a Unix socket where one is wanted.

    It listens from the first session on, or from where it is entered, on that event loop, until it is stopped.
    """

    def __init__(
        self,
        *,
        socket_path: Path | None = None,
        max_body_bytes: int = MAX_BODY_BYTES,
        keep_alive_s: float = KEEP_ALIVE_S,
    ) -> None:
        """
        Args:
            socket_path: Where the Unix socket is made, and a folder for it if there is none. Whoever reaches it still
                needs a session's key.
            max_body_bytes: Longer requests are refused.
            keep_alive_s: A stream that waits for its answer says so this often.

        Raises:
            ValueError: the path of the socket is longer than the system takes.
        """
        if socket_path is not None and len(bytes(socket_path)) > _MAX_SOCKET_PATH:
            raise ValueError(f"{socket_path}: the path of a Unix socket has at most {_MAX_SOCKET_PATH} bytes")
        self._socket_path = socket_path
        self._keep_alive_s = keep_alive_s
        self._sessions: dict[str, _Session] = {}
        self.offers = Offers()
        self._runner = web.AppRunner(
            self._application(max_body_bytes),
            access_log=None,
            auto_decompress=False,
            handler_cancellation=True,
            shutdown_timeout=_SHUTDOWN_S,
        )
        self._port: int | None = None
        self._made_folder = False
        self._starting = asyncio.Lock()

    async def __aenter__(self) -> Self:
        await self._listen()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def open(self, session_id: str, completer: Completer) -> SessionAddress:
        """Answer the requests of a session by `completer`, until it is closed, to whoever has the key."""
        port = await self._listen()
        assert session_id not in self._sessions, f"session {session_id!r} is open already"
        key = f"sk-{secrets.token_urlsafe(32)}"
        self._sessions[session_id] = _Session(completer=completer, key=key.encode())
        url = f"http://127.0.0.1:{port}/sessions/{quote(session_id, safe='')}"
        return SessionAddress(
            base_url=f"{url}/v1", anthropic_base_url=url, api_key=key, socket_path=self._socket_path
        )

    async def close(self, session_id: str) -> None:
        """End a session: what is asked of it from now on, and what it is being asked, is answered with 410."""
        session = self._sessions.pop(session_id)
        session.is_closed = True
        for task in session.running:
            task.cancel()

    async def stop(self) -> None:
        """End all sessions, and listen no longer."""
        for session_id in list(self._sessions):
            await self.close(session_id)
        await self._runner.cleanup()
        if self._socket_path is not None:
            self._socket_path.unlink(missing_ok=True)
            if self._made_folder:
                self._socket_path.parent.rmdir()

    async def offers_address(self) -> tuple[str, str]:
        """Where programs take up the episodes that are offered, and the key for it."""
        return f"http://127.0.0.1:{await self._listen()}", self.offers.key

    async def _listen(self) -> int:
        """The port, on which it listens from the first call on."""
        async with self._starting:
            if self._port is None:
                await self._runner.setup()
                await web.TCPSite(self._runner, "127.0.0.1", 0, backlog=_BACKLOG).start()
                if self._socket_path is not None:
                    self._made_folder = not self._socket_path.parent.exists()
                    self._socket_path.parent.mkdir(parents=True, exist_ok=True)
                    await web.UnixSite(self._runner, self._socket_path, backlog=_BACKLOG).start()
                    # As open as the port is: keys keep others out, and programs in sandboxes are other users.
                    self._socket_path.chmod(0o666)
                self._port = int(self._runner.addresses[0][1])
        return self._port

    def _application(self, max_body_bytes: int) -> web.Application:
        application = web.Application(middlewares=[_say_problems], client_max_size=max_body_bytes)
        path = "/sessions/{session}/v1"
        application.add_routes(
            [
                web.post(f"{path}/chat/completions", self._completion_handler(_CHAT)),
                web.post(f"{path}/responses", self._completion_handler(_RESPONSES)),
                web.post(f"{path}/messages", self._completion_handler(_MESSAGES)),
                web.post(f"{path}/messages/count_tokens", self._count_tokens),
                web.get(f"{path}/models", self._models),
                web.post("/episodes", self._take_episode),
                web.post("/sessions/{session}/end", self._end_episode),
            ]
        )
        return application

    def _completion_handler(self, wire: _Wire) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        async def handle(request: web.Request) -> web.StreamResponse:
            session = self._session_of(request)
            exchange = wire.read(await _read_body(request), session, _is_retry(request))
            async with _running(session, exchange.request) as task:
                await asyncio.wait({task}, timeout=self._keep_alive_s if exchange.is_stream else None)
                if exchange.is_stream:
                    return await self._stream(request, wire, exchange, session, task)
                return _json(exchange.answer(_result(task, session), created_s=int(time.time())))

        return handle

    async def _stream(
        self,
        request: web.Request,
        wire: _Wire,
        exchange: Exchange,
        session: _Session,
        task: asyncio.Task[Completion],
    ) -> web.StreamResponse:
        """Send the events. What goes wrong before the first one has a status of its own."""
        if task.done():
            _result(task, session)
        response = web.StreamResponse(
            headers={"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache"}
        )
        await response.prepare(request)
        while not task.done():
            await response.write(wire.keep_alive)
            await asyncio.wait({task}, timeout=self._keep_alive_s)
        try:
            events = b"".join(exchange.events(_result(task, session), created_s=int(time.time())))
        except Exception as error:  # noqa: BLE001  the border of one episode: its client is told
            problem = _problem_of(error, request)
            events = wire.stream_error(problem.message, status=problem.status)
        await response.write(events)
        await response.write_eof()
        return response

    async def _count_tokens(self, request: web.Request) -> web.Response:
        session = self._session_of(request)
        exchange = read_messages(await _read_body(request), session.kept_threads)
        if not isinstance(session.completer, CountsTokens):
            raise RequestRefused("this session does not count tokens", status=404)
        return _json({"input_tokens": await session.completer.count_tokens(exchange.request)})

    async def _take_episode(self, request: web.Request) -> web.Response:
        if not _has_key(request, self.offers.key.encode()):
            raise RequestRefused("the key is not that of this endpoint's episodes", status=401)
        offer = self.offers.take()
        return _json(
            {
                "session_id": offer.session_id,
                "task_id": offer.task_id,
                "messages": offer.messages,
                "tools": [tool.to_openai() for tool in offer.tools],
                "base_url": offer.address.base_url,
                "anthropic_base_url": offer.address.anthropic_base_url,
                "api_key": offer.address.api_key,
            }
        )

    async def _end_episode(self, request: web.Request) -> web.Response:
        self._session_of(request)
        body = await _read_body(request)
        metrics = read_object(body.get("metrics") or {}, "metrics")
        worth = Worth(
            reward=read_number(body.get("reward"), "reward"),
            metrics={name: read_number(value, f"metrics.{name}") for name, value in metrics.items()},
        )
        self.offers.end(request.match_info["session"], worth)
        return _json({"ended": True})

    async def _models(self, request: web.Request) -> web.Response:
        self._session_of(request)
        model = {"id": MODEL, "object": "model", "created": 0, "owned_by": "polyturn"}
        return _json(
            {"object": "list", "data": [model], "has_more": False, "first_id": MODEL, "last_id": MODEL}
        )

    def _session_of(self, request: web.Request) -> _Session:
        """The session that a request names and has the key of."""
        session = self._sessions.get(request.match_info["session"])
        if session is None:
            refuse_ended()
        if not _has_key(request, session.key):
            raise RequestRefused("the key is not that of this session", status=401)
        return session


def _has_key(request: web.Request, key: bytes) -> bool:
    """Whether a request comes with a key, in either of the ways in which clients send it."""
    scheme, _, bearer = request.headers.get("Authorization", "").partition(" ")
    given = [request.headers.get("x-api-key", ""), bearer.strip() if scheme.lower() == "bearer" else ""]
    return any(hmac.compare_digest(each.encode("utf-8", "surrogateescape"), key) for each in given)


def refuse_ended() -> NoReturn:
    """Say that a session is no more, with a status after which clients do not ask again."""
    raise RequestRefused("there is no such session, or it has ended", status=410)


@asynccontextmanager
async def _running(session: _Session, request: CompletionRequest) -> AsyncIterator[asyncio.Task[Completion]]:
    """The answer while it is being made. It is cancelled at the end of the block: its client may have gone."""
    task = asyncio.ensure_future(session.completer.complete(request))
    session.running.add(task)
    try:
        yield task
    finally:
        session.running.discard(task)
        if not task.done():
            task.cancel()
            await asyncio.wait({task})
        if not task.cancelled():
            task.exception()  # whoever wanted to know it has gone


def _result(task: asyncio.Task[Completion], session: _Session) -> Completion:
    if task.cancelled():
        if session.is_closed:
            refuse_ended()
        raise RequestRefused("the request was given up", status=503)
    return task.result()


@web.middleware
async def _say_problems(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """Say whatever keeps a request from being answered in the form of the client's protocol."""
    try:
        return await handler(request)
    except ConnectionError:
        raise  # the client has gone, and nobody is to be told
    except Exception as error:  # noqa: BLE001  the border of one episode: its client is told
        problem = _problem_of(error, request)
    is_anthropic = "anthropic-version" in request.headers or "/v1/messages" in request.path
    error_form = anthropic_error if is_anthropic else openai_error
    answer = _json(error_form(problem.message, status=problem.status), status=problem.status)
    answer.headers.update(problem.headers)
    return answer


def _problem_of(error: Exception, request: web.Request) -> _Problem:
    if isinstance(error, RequestRefused):
        wait_s = error.retry_after_s
        headers = {}
        if wait_s is not None:
            headers = {"Retry-After": str(math.ceil(wait_s)), "retry-after-ms": str(math.ceil(wait_s * 1000))}
        return _Problem(message=str(error), status=error.status, headers=headers)
    if isinstance(error, web.HTTPException):
        message = f"{request.method} {request.path}: {error.reason}"
        if isinstance(error, web.HTTPRequestEntityTooLarge):
            message = "the request is larger than the endpoint takes"
        return _Problem(message=message, status=error.status)
    if isinstance(error, PolicyFault):
        # What failed, and where the engines are, is no business of a program that a policy runs.
        return _Problem(message="the engine behind the policy gave no answer", status=503)
    logger.error("session %s: %s", request.match_info.get("session", ""), failure_text(error))
    return _Problem(
        message=f"the session failed ({type(error).__name__}); the log of the run says more",
        status=500,
        headers={"x-should-retry": "false"},
    )


async def _read_body(request: web.Request) -> dict[str, Any]:
    """The body, which has to be a JSON object."""
    if request.headers.get("Content-Encoding", "identity") != "identity":
        raise RequestRefused("the body must not be compressed", status=415)
    raw = await request.read()
    try:
        body = orjson.loads(raw)
    except ValueError:
        body = _loads_leniently(raw)
    if not isinstance(body, dict):
        raise RequestRefused(f"the body must be a JSON object, not a {type(body).__name__}")
    return body


def _loads_leniently(raw: bytes) -> Any:
    """JSON with half a surrogate pair in it, which Python's clients write and orjson does not read."""
    try:
        return json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise RequestRefused(f"the body is not JSON: {str(error)[:200] or type(error).__name__}") from error


def _is_retry(request: web.Request) -> bool:
    return request.headers.get("x-stainless-retry-count", "0") not in ("", "0")


def _json(value: Mapping[str, Any], *, status: int = 200) -> web.Response:
    return web.Response(body=orjson.dumps(value), status=status, content_type="application/json")
