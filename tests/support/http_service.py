"""A service on the loopback interface that answers as a test says: numbers, garbage, errors, or never."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = int | bytes | dict[str, Any] | None
"""A status alone, a body as it is, a JSON object, or None: the connection is held until the service ends."""


class Service:
    """Answers each POST with `reply(body)`; `bodies` are those that came."""

    def __init__(self, reply: Callable[[dict[str, Any]], Reply]) -> None:
        self.reply = reply
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self._ended = threading.Event()
        service = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                service.bodies.append(body)
                service.headers.append({name.lower(): value for name, value in self.headers.items()})
                reply = service.reply(body)
                if reply is None:
                    service._ended.wait(30)
                    self.close_connection = True
                    return
                status = reply if isinstance(reply, int) else 200
                content = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
                with contextlib.suppress(OSError):  # the client may have given up
                    self.send_response(status)
                    self.send_header("content-length", str(len(content)))
                    self.end_headers()
                    self.wfile.write(content)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    def close(self) -> None:
        self._ended.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@contextlib.contextmanager
def serving(reply: Callable[[dict[str, Any]], Reply]) -> Iterator[Service]:
    """A service for as long as the block runs."""
    service = Service(reply)
    try:
        yield service
    finally:
        service.close()
