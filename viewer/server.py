"""The HTTP server of the page: this machine alone, reading alone.

What keeps other pages in the same browser out: requests must name this server as their host, so that a name that
somebody points at 127.0.0.1 reaches nothing; no answer may be read from another origin; the page runs no script and
loads nothing but what this server sends. The one request that does something, playing a turn on, needs a token that
only the page has.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import ipaddress
import logging
import threading
from collections.abc import Awaitable, Callable
from importlib import resources
from importlib.resources.abc import Traversable

import orjson
from aiohttp import web

from polyturn.agents.episode import failure_text
from polyturn.configs.addresses import http_url
from polyturn.viewer.answers import Answers, Conflict
from polyturn.viewer.parameters import BadParameter, NotThere, Parameters
from polyturn.viewer.plain_json import dumps
from polyturn.viewer.playing_on import PlayingOn

logger = logging.getLogger(__name__)
ASSETS = "assets"
INDEX = "index.html"
COMPRESS_FROM = 4_096
CONTENT_SECURITY_POLICY = "; ".join(
    [
        "default-src 'none'",
        "script-src 'self'",
        # Charts set widths and colours of their elements.
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data:",
        "font-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    ]
)
HEADERS = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "X-Frame-Options": "DENY",
}
TYPES = {
    ".html": "text/html",
    ".js": "text/javascript",
    ".css": "text/css",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".woff2": "font/woff2",
    ".json": "application/json",
}
PLACEHOLDER = b"""<!doctype html><meta charset="utf-8"><title>Polyturn</title>
<p>The page of the viewer is not built; its data is at /api/runs.</p>
"""

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def page_files() -> dict[str, bytes]:
    """The files of the page, by their paths below `/`."""
    found: dict[str, bytes] = {}
    root = resources.files("polyturn.viewer") / ASSETS

    def collect(folder: Traversable, path: str) -> None:
        for item in folder.iterdir():
            if item.is_dir():
                collect(item, f"{path}{item.name}/")
            elif not item.name.startswith("."):
                found[f"{path}{item.name}"] = item.read_bytes()

    if root.is_dir():
        collect(root, "")
    return {INDEX: PLACEHOLDER, **found}


class ViewerServer:
    """Serves the page and the API on one port, in a thread that answers one request at a time."""

    def __init__(
        self, answers: Answers, *, host: str = "127.0.0.1", port: int = 0, playing_on: PlayingOn | None = None
    ) -> None:
        """`host`: an address of this machine; what listens on all of them answers to every name."""
        self._answers = answers
        self._host = host
        self._port = port
        self._playing_on = playing_on
        self._lock = threading.Lock()
        self._files = page_files()
        self._runner = web.AppRunner(self._application(), access_log=None, shutdown_timeout=1.0)

    async def start(self) -> str:
        """Listen; the page's address. Raises `OSError` where the port is taken."""
        await self._runner.setup()
        await web.TCPSite(self._runner, self._host, self._port).start()
        self._port = int(self._runner.addresses[0][1])
        return f"{http_url(self._host, self._port)}/"

    async def stop(self) -> None:
        """Listen no longer."""
        await self._runner.cleanup()
        if self._playing_on is not None:
            await self._playing_on.close()

    def _application(self) -> web.Application:
        application = web.Application(middlewares=[self._guarded], client_max_size=64 * 1024)
        application.router.add_get("/api/played", self._played)
        if self._playing_on is not None:
            application.router.add_post("/api/play", self._play)
        application.router.add_get("/api/{name:.*}", self._answer)
        application.router.add_get("/{path:.*}", self._file)
        return application

    @web.middleware
    async def _guarded(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            if not self._is_our_host(request.headers.get("Host", "")):
                response: web.StreamResponse = _error("this server does not have that name", 421)
            else:
                response = await handler(request)
        except (NotThere, BadParameter, Conflict) as error:
            response = _error(str(error), _STATUS[type(error)])
        except web.HTTPException as error:
            response = _error(f"{request.method} {request.path[:200]}: {error.reason}", error.status)
        except asyncio.CancelledError:
            raise
        except Exception as error:  # noqa: BLE001  the border of one request: the page is told, and goes on
            logger.error("%s: %s", request.path, failure_text(error))
            response = _error("the viewer failed; its log says more", 500)
        response.headers.update(HEADERS)
        return response

    def _is_our_host(self, host: str) -> bool:
        """Whether a request was made to this server by an address of its own."""
        name, colon, port = host.rpartition(":")
        if not colon or port != str(self._port):
            return False
        name = name.strip("[]")
        if name in ("localhost", self._host):
            return True
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return False
        # An address as a name needs no name service, so that nobody can have pointed it here.
        return address.is_loopback or self._host in ("0.0.0.0", "::")

    async def _answer(self, request: web.Request) -> web.Response:
        parameters = Parameters(request.query.items())
        body = await asyncio.to_thread(self._body, request.path, parameters)
        return _json(request, body)

    def _body(self, path: str, parameters: Parameters) -> bytes:
        with self._lock:
            return dumps(self._answers.answer(path, parameters))

    async def _file(self, request: web.Request) -> web.Response:
        path = request.match_info["path"] or INDEX
        # Names of files that were read at the start: nothing else can be asked for, whatever is in the path.
        content = self._files.get(path)
        if content is None:
            raise NotThere("there is no such file")
        kind = next(
            (kind for ending, kind in TYPES.items() if path.endswith(ending)), "application/octet-stream"
        )
        return _cached(request, content, kind)

    async def _play(self, request: web.Request) -> web.Response:
        assert self._playing_on is not None
        if not self._playing_on.has_token(request.headers.get("X-Polyturn-Token", "")):
            raise web.HTTPForbidden(reason="the token is not that of this page")
        try:
            wanted = orjson.loads(await request.read())
        except ValueError as error:
            raise BadParameter("the body must be JSON") from error
        return _json(request, dumps({"id": await self._playing_on.begin(wanted)}))

    async def _played(self, request: web.Request) -> web.Response:
        if self._playing_on is None:
            raise NotThere("no policy is served; give one with --policy-url")
        identity = Parameters(request.query.items()).required("id")
        return _json(request, dumps(self._playing_on.played(identity)))


_STATUS = {NotThere: 404, BadParameter: 400, Conflict: 409}


def _error(sentence: str, status: int) -> web.Response:
    return web.Response(
        body=dumps({"error": sentence[:2_000]}), status=status, content_type="application/json"
    )


def _json(request: web.Request, body: bytes) -> web.Response:
    return _cached(request, body, "application/json")


def _cached(request: web.Request, body: bytes, kind: str) -> web.Response:
    """An answer that the browser asks for again by its ETag, which a body has that is the same."""
    tag = f'"{hashlib.blake2b(body, digest_size=12).hexdigest()}"'
    headers = {"ETag": tag, "Cache-Control": "no-cache"}
    if tag in request.headers.get("If-None-Match", ""):
        return web.Response(status=304, headers=headers)
    is_text = kind.startswith("text/") or kind in ("application/json", "image/svg+xml")
    response = web.Response(
        body=body, headers=headers, content_type=kind, charset="utf-8" if is_text else None
    )
    if is_text and len(body) >= COMPRESS_FROM:
        response.enable_compression()
    return response


async def serve(server: ViewerServer, on_start: Callable[[str], None]) -> None:
    """Serve until cancelled; `on_start` is told the address."""
    on_start(await server.start())
    try:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
    finally:
        await server.stop()
