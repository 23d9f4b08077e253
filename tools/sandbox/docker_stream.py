"""The runner's stdin and stdout, over the stream that the Docker daemon attaches to a container."""

from __future__ import annotations

import contextlib
import socket
import struct
import time
from typing import Any

from polyturn.tools.sandbox.runner.framing import Decoder, FramingError, encode
from polyturn.tools.sandbox.runner_sandbox import LinkEnded

_HEADER = struct.Struct(">BxxxL")
"""Without a terminal the daemon puts this before every piece: which stream it belongs to, and its length.

https://docs.docker.com/reference/api/engine (attach to a container, stream format)
"""
_STDOUT, _STDERR = 1, 2
_KEPT_BYTES_OF_STDERR = 4096


class AttachedStream:
    """Frames to and from a container. Not for several threads at a time."""

    def __init__(self, attached: Any) -> None:
        """`attached` is what `Container.attach_socket` gives; it must be attached before the container starts."""
        self._attached = attached
        self._socket = getattr(attached, "_sock", attached)
        self._decoder = Decoder()
        self._pending = b""
        self._stderr = b""

    @property
    def stderr(self) -> str:
        """The end of what the runner wrote to stderr."""
        return self._stderr.decode(errors="replace").strip()

    def ask(
        self, question: dict[str, Any], body: bytes = b"", *, within_s: float, max_body_bytes: int = 1 << 16
    ) -> tuple[dict[str, Any], bytes]:
        """Sends one frame and waits for one, of which the body may have so many bytes.

        Raises LinkEnded. The stream is of no use then: a late answer would be taken for the next question's.
        """
        deadline = time.monotonic() + within_s
        # The runner's answers are small beside their body; what is inside may try to make it say something else.
        self._decoder.max_header_bytes, self._decoder.max_body_bytes = 1 << 16, max_body_bytes
        try:
            self._limit_to(deadline)
            self._socket.sendall(encode(question, body))
            while (frame := self._decoder.next_frame()) is None:
                self._receive(deadline)
        except TimeoutError:
            raise LinkEnded(f"the sandbox did not answer within {within_s:g} s") from None
        except (OSError, EOFError, ValueError):  # ValueError: closed by another thread
            raise LinkEnded(f"the sandbox ended {self.stderr[-300:]}".rstrip()) from None
        except FramingError as error:
            raise LinkEnded(f"the sandbox broke the protocol: {error}") from None
        return frame

    def ended(self) -> bool:
        """Whether the other end has gone since the last answer."""
        try:
            self._receive(time.monotonic())
        except TimeoutError:
            return False
        except (OSError, EOFError, ValueError):
            return True
        return True  # a runner says nothing unasked

    def interrupt(self) -> None:
        """Ends an `ask` that waits in another thread, and all later ones."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Closes it, upon which the runner ends."""
        # The response's own buffer has to go before the socket that it reads from.
        response = getattr(self._attached, "_response", None)
        if response is not None:
            response.close()
        self._attached.close()
        self._socket.close()

    def _limit_to(self, deadline: float) -> None:
        # 0 would mean "do not block at all", which fails in another way.
        self._socket.settimeout(max(deadline - time.monotonic(), 1e-3))

    def _receive(self, deadline: float) -> None:
        """Reads once, and hands on every whole piece."""
        self._limit_to(deadline)
        data = self._socket.recv(1 << 18)
        if not data:
            raise EOFError
        data = self._pending + data
        start = 0
        while len(data) - start >= _HEADER.size:
            stream, length = _HEADER.unpack_from(data, start)
            end = start + _HEADER.size + length
            if end > len(data):
                break
            piece = data[start + _HEADER.size : end]
            if stream == _STDOUT:
                self._decoder.feed(piece)
            elif stream == _STDERR:
                self._stderr = (self._stderr + piece)[-_KEPT_BYTES_OF_STDERR:]
            start = end
        self._pending = data[start:]
