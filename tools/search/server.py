"""A retriever over HTTP: Search-R1's `/retrieve`, ASearcher's `/access`, and `/health`.

An ASGI application without a framework: a request with one query costs a few dozen microseconds beside the search.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import orjson

from polyturn.configs.addresses import advertised_address, bind_address, http_url
from polyturn.tools.search.corpus import PageFile
from polyturn.tools.search.retrieval import Hit, Retriever, SearchFailed, SearchUnavailable
from polyturn.tools.search.wire import (
    BadRequest,
    RetrieveRequest,
    read_request,
    read_urls,
    write_answer,
    write_pages,
)

MAX_BODY_BYTES = 16 * 1024 * 1024
HEAD_S = 30.0
"""For the head of a request: uvicorn would wait for ever, and each such connection holds a descriptor."""
_JSON = [(b"content-type", b"application/json")]
_log = logging.getLogger(__name__)

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]
Results = list[Sequence[Hit]]


class SearchApp:
    """The ASGI application. Searches run in threads, and those that arrive together share a thread's turn."""

    def __init__(
        self,
        retriever: Retriever,
        *,
        top_k: int = 3,
        pages: PageFile | None = None,
        num_threads: int | None = None,
        body_timeout_s: float = 30.0,
    ) -> None:
        """
        Args:
            retriever: What searches; its `page(url)`, where it has one, serves `/access`.
            top_k: Passages for a request that does not say.
            pages: Further pages for `/access`.
            num_threads: Searches at once; None: one for each core.
            body_timeout_s: How long a request's body may take to arrive.
        """
        self._body_timeout_s = body_timeout_s
        self._retriever = retriever
        self._top_k = top_k
        self._pages = pages
        self._num_threads = num_threads or os.cpu_count() or 1
        self._threads = ThreadPoolExecutor(self._num_threads, thread_name_prefix="search")
        self._waiting: list[tuple[RetrieveRequest, asyncio.Future[Results]]] = []
        self._jobs: set[asyncio.Task[None]] = set()
        self._routes = {
            ("POST", "/retrieve"): self._retrieve,
            ("POST", "/access"): self._access,
            ("GET", "/health"): self._health,
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request. There are no websockets."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        assert scope["type"] == "http", "run with lifespan off"
        status, body = await self._respond(scope, receive)
        await send({"type": "http.response.start", "status": status, "headers": _headers(body)})
        await send({"type": "http.response.body", "body": body})

    def close(self) -> None:
        """End the threads."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _respond(self, scope: Scope, receive: Receive) -> tuple[int, bytes]:
        path, method = scope["path"], scope["method"]
        route = self._routes.get((method, path))
        if route is None:
            known = sorted({known_path for _, known_path in self._routes})
            if path in known:
                return 405, _detail(f"{path} does not answer {method}")
            return 404, _detail(f"there is no {path}; there are {', '.join(known)}")
        try:
            async with asyncio.timeout(self._body_timeout_s):
                body = await _body(receive)
        except TimeoutError:
            return 408, _detail(f"the body did not come within {self._body_timeout_s:g} s")
        except BadRequest as error:
            return error.status, _detail(str(error))
        try:
            return 200, await route(body)
        except BadRequest as error:
            return error.status, _detail(str(error))
        except (SearchFailed, SearchUnavailable) as error:
            return 503, _detail(str(error))
        except Exception as error:  # noqa: BLE001  a server answers that it failed, and goes on
            _log.exception("%s %s failed", method, path)
            return 500, _detail(f"the search failed: {type(error).__name__}: {error}")

    async def _retrieve(self, body: bytes) -> bytes:
        request = read_request(body, default_top_k=self._top_k)
        loop = asyncio.get_running_loop()
        found: asyncio.Future[Results] = loop.create_future()
        if not self._waiting:
            loop.call_soon(self._dispatch)
        self._waiting.append((request, found))
        return write_answer(await found, return_scores=request.return_scores)

    def _dispatch(self) -> None:
        """Share the requests that have gathered among as many threads as can use them."""
        requests, self._waiting = self._waiting, []
        alone = len(requests) == 1 and len(requests[0][0].queries) == 1 and not self._jobs
        if alone and getattr(self._retriever, "is_quick", False):
            # Nobody else waits, and a thread's turn would cost as much as the search.
            _tell(requests, search_all(self._retriever, [requests[0][0]]))
            return
        share = -(-len(requests) // self._num_threads)
        for start in range(0, len(requests), share):
            job = asyncio.get_running_loop().create_task(self._run(requests[start : start + share]))
            self._jobs.add(job)
            job.add_done_callback(self._jobs.discard)

    async def _run(self, requests: list[tuple[RetrieveRequest, asyncio.Future[Results]]]) -> None:
        search = functools.partial(search_all, self._retriever, [request for request, _ in requests])
        _tell(requests, await asyncio.get_running_loop().run_in_executor(self._threads, search))

    async def _access(self, body: bytes) -> bytes:
        urls = read_urls(body)
        loop = asyncio.get_running_loop()
        return write_pages(urls, await loop.run_in_executor(self._threads, self._find_pages, urls))

    def _find_pages(self, urls: Sequence[str]) -> list[str | None]:
        find = getattr(self._retriever, "page", lambda _: None)
        pages = [None if self._pages is None else self._pages.page(url) for url in urls]
        return [page if page is not None else find(url) for url, page in zip(urls, pages, strict=True)]

    async def _health(self, body: bytes) -> bytes:
        del body
        size = getattr(self._retriever, "__len__", lambda: None)()
        return orjson.dumps({"status": "ok", "num_passages": size})


def _tell(
    requests: Sequence[tuple[RetrieveRequest, asyncio.Future[Results]]],
    outcomes: Sequence[Results | Exception],
) -> None:
    """Give each request its outcome, unless it was given up."""
    for (_, found), outcome in zip(requests, outcomes, strict=True):
        if found.done():
            continue
        if isinstance(outcome, Exception):
            found.set_exception(outcome)
        else:
            found.set_result(outcome)


def search_all(retriever: Retriever, requests: Sequence[RetrieveRequest]) -> list[Results | Exception]:
    """The results of each request, or what went wrong with it."""
    many = getattr(retriever, "search_many", None)
    outcomes: list[Results | Exception] = []
    for request in requests:
        try:
            if many is not None and len(request.queries) > 1:
                outcomes.append(list(many(request.queries, request.top_k)))
            else:
                outcomes.append([retriever.search(query, request.top_k) for query in request.queries])
        except Exception as error:  # noqa: BLE001  whoever asked is told, and the others get their results
            outcomes.append(error)
    return outcomes


def run_server(app: SearchApp, *, host: str, port: int, on_start: Callable[[str], None]) -> None:
    """Serve until interrupted. Raises `ValueError` when the address cannot be had."""
    listener = _listen(host, port)
    server = _server(app)
    on_start(_url(listener))
    try:
        server.run(sockets=[listener])
    finally:
        app.close()


@contextlib.contextmanager
def served(app: SearchApp, *, host: str = "127.0.0.1", port: int = 0) -> Iterator[str]:
    """Serve from a thread of this process; gives the url."""
    listener = _listen(host, port)
    server = _server(app)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        yield _url(listener)
    finally:
        server.should_exit = True
        thread.join()
        app.close()


def _server(app: SearchApp) -> Any:
    try:
        import uvicorn
    except ImportError as error:
        raise ValueError("serving needs uvicorn; install it with: pip install 'polyturn[search]'") from error
    return uvicorn.Server(
        uvicorn.Config(
            app,
            http=_patient_protocol(),
            ws="none",
            lifespan="off",
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=5,
        )
    )


def _patient_protocol() -> Any:
    """uvicorn's HTTP protocol with a deadline for the head of a request."""
    from uvicorn.protocols.http.auto import AutoHTTPProtocol

    protocol: Any = AutoHTTPProtocol

    class PatientProtocol(protocol):  # type: ignore[misc]
        """Closes a connection on which no head is complete `HEAD_S` after its first byte, or after connecting."""

        _head_timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:
            """The first head may take its time from here."""
            super().connection_made(transport)
            self._head_timer = self.loop.call_later(HEAD_S, transport.close)

        def data_received(self, data: bytes) -> None:
            """Starts the clock where data begins a request, and stops it where a request can be answered."""
            super().data_received(data)
            if self.cycle is not None and not self.cycle.response_complete:
                self._stop_clock()
            elif self._head_timer is None:
                self._head_timer = self.loop.call_later(HEAD_S, self.transport.close)

        def connection_lost(self, exc: Exception | None) -> None:
            """Nothing is waited for any more."""
            self._stop_clock()
            super().connection_lost(exc)

        def _stop_clock(self) -> None:
            if self._head_timer is not None:
                self._head_timer.cancel()
                self._head_timer = None

    return PatientProtocol


def _url(listener: socket.socket) -> str:
    """Where the server is found: by this machine's name, where it listens on all of its addresses."""
    address, port = listener.getsockname()[:2]
    return http_url(advertised_address(address, own=socket.gethostname()), port)


def _listen(host: str, port: int) -> socket.socket:
    address = bind_address(host)
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address, port))
        listener.listen(1024)
    except OSError as error:
        listener.close()
        raise ValueError(f"cannot listen on {host}:{port}: {error.strerror or error}") from error
    return listener


async def _body(receive: Receive) -> bytes:
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise BadRequest("the client went away", status=400)
        part = message.get("body", b"")
        size += len(part)
        if size > MAX_BODY_BYTES:
            raise BadRequest(f"the body has more than {MAX_BODY_BYTES} bytes", status=413)
        parts.append(part)
        if not message.get("more_body"):
            return parts[0] if len(parts) == 1 else b"".join(parts)


def _headers(body: bytes) -> list[tuple[bytes, bytes]]:
    return [*_JSON, (b"content-length", str(len(body)).encode())]


def _detail(text: str) -> bytes:
    return orjson.dumps({"detail": text})
