"""What stands behind a Docker sandbox: a container with a runner that is ready."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from typing import Any

from polyturn.tools.sandbox.docker_owner import remove
from polyturn.tools.sandbox.docker_stream import AttachedStream
from polyturn.tools.sandbox.runner_sandbox import LinkEnded


class ContainerRoom:
    """A container. `close` may come from any thread; it ends an `ask` that waits in another."""

    def __init__(
        self, handle: Any, stream: AttachedStream, discard_soon: Callable[[ContainerRoom], None]
    ) -> None:
        """`handle` is a `docker.models.containers.Container`; `discard_soon` calls `discard` in the background."""
        self.handle = handle
        self._stream = stream
        self._discard_soon = discard_soon
        self._asking = threading.Lock()
        self._state = threading.Lock()
        self._closed = False

    def ask(
        self, question: dict[str, Any], body: bytes = b"", *, within_s: float, max_body_bytes: int
    ) -> tuple[dict[str, Any], bytes]:
        """Asks the runner. Raises LinkEnded."""
        with self._asking:
            if self._closed:
                raise LinkEnded("the sandbox has ended")
            return self._stream.ask(question, body, within_s=within_s, max_body_bytes=max_body_bytes)

    def memory_mark(self) -> float:
        """The time."""
        return time.time()

    def ran_out_of_memory(self, mark: float) -> bool:
        """Whether the daemon tells of a kill for want of memory since then (by its clock; it keeps no count)."""
        events = self.handle.client.events(
            since=f"{mark:.6f}",
            until=f"{time.time() + 0.001:.6f}",
            filters={"container": self.handle.id, "event": "oom"},
            decode=True,
        )
        return any(True for _ in events)

    def alive(self) -> bool:
        """Whether the runner is there."""
        if self._closed:
            return False
        if not self._asking.acquire(blocking=False):
            return True
        try:
            return not self._stream.ended()
        finally:
            self._asking.release()

    def close(self) -> None:
        """Kills everything inside, in the background; again is harmless."""
        with self._state:
            if self._closed:
                return
            self._closed = True
        self._stream.interrupt()
        self._discard_soon(self)

    def discard(self) -> None:
        """Kills and removes the container; what a daemon refuses is left to the next sweep."""
        from docker.errors import DockerException

        self._closed = True
        self._stream.interrupt()
        with self._asking:
            self._stream.close()
        with contextlib.suppress(DockerException):
            remove(self.handle)
