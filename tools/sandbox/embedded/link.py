"""The host's end of a connection to a runner."""

from __future__ import annotations

import socket
import time
from typing import Any

from polyturn.tools.sandbox.runner.framing import Decoder, FramingError, encode
from polyturn.tools.sandbox.runner_sandbox import LinkEnded

MAX_HEADER_BYTES = 1 << 16


class Link:
    """Questions and answers over a stream socket. Not for several threads at a time."""

    def __init__(self, stream: socket.socket) -> None:
        self._stream = stream
        self._decoder = Decoder(max_header_bytes=MAX_HEADER_BYTES)

    def ask(
        self, question: dict[str, Any], body: bytes = b"", *, within_s: float, max_body_bytes: int
    ) -> tuple[dict[str, Any], bytes]:
        """The answer to a question, whose body has at most so many bytes.

        Raises LinkEnded. The link is of no use then: a late answer would be taken for the next question's.
        """
        deadline = time.monotonic() + within_s
        self._decoder.max_body_bytes = max_body_bytes
        try:
            self._stream.settimeout(within_s)
            self._stream.sendall(encode(question, body))
            while (frame := self._decoder.next_frame()) is None:
                self._stream.settimeout(max(deadline - time.monotonic(), 0.001))
                data = self._stream.recv(1 << 16)
                if not data:
                    raise LinkEnded("the sandbox ended")
                self._decoder.feed(data)
        except TimeoutError:
            raise LinkEnded(f"the sandbox did not answer within {within_s:g} s") from None
        except OSError:
            raise LinkEnded("the sandbox ended") from None
        except FramingError as error:
            raise LinkEnded(f"the sandbox broke the protocol: {error}") from None
        return frame

    def is_open(self) -> bool:
        """Whether the other end is there; it says nothing unless it is asked."""
        self._stream.settimeout(0)
        try:
            self._stream.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False

    def close(self) -> None:
        """Closes the connection, on which the runner ends."""
        self._stream.close()
