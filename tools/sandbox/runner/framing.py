"""Frames on a stream of bytes: lengths, a JSON header, a body. Both ends use this module."""

from __future__ import annotations

import json
import os
import struct
from typing import Any

LENGTHS = struct.Struct(">II")
MAX_HEADER_BYTES = 64 << 20
"""A header holds the code to run, so it may be long; the bound keeps a broken stream from claiming memory."""


class FramingError(Exception):
    """The stream does not carry frames, or one that is larger than the reader allows."""


def encode(header: dict[str, Any], body: bytes = b"") -> bytes:
    """One frame."""
    text = json.dumps(header).encode()
    return LENGTHS.pack(len(text), len(body)) + text + body


class Decoder:
    """Takes bytes as they come and gives whole frames; never holds more than one frame and one read."""

    def __init__(
        self, *, max_header_bytes: int = MAX_HEADER_BYTES, max_body_bytes: int = MAX_HEADER_BYTES
    ) -> None:
        self.max_header_bytes = max_header_bytes
        self.max_body_bytes = max_body_bytes
        self._buffer = bytearray()

    def feed(self, data: bytes) -> None:
        """Adds bytes that arrived."""
        self._buffer += data

    def next_frame(self) -> tuple[dict[str, Any], bytes] | None:
        """The next whole frame, or None where more bytes are needed. Raises FramingError."""
        if len(self._buffer) < LENGTHS.size:
            return None
        header_bytes, body_bytes = LENGTHS.unpack_from(self._buffer)
        if header_bytes > self.max_header_bytes or body_bytes > self.max_body_bytes:
            raise FramingError(f"a frame of {header_bytes} + {body_bytes} bytes is larger than allowed")
        start = LENGTHS.size + header_bytes
        end = start + body_bytes
        if len(self._buffer) < end:
            return None
        try:
            header = json.loads(self._buffer[LENGTHS.size : start])
        except ValueError as error:
            raise FramingError(f"a header is not JSON: {error}") from None
        if not isinstance(header, dict):
            raise FramingError("a header is not an object")
        body = bytes(self._buffer[start:end])
        del self._buffer[:end]
        return header, body


def read_frame(fd: int, decoder: Decoder) -> tuple[dict[str, Any], bytes]:
    """Waits for a whole frame. Raises EOFError when the stream ends."""
    while (frame := decoder.next_frame()) is None:
        data = os.read(fd, 1 << 16)
        if not data:
            raise EOFError
        decoder.feed(data)
    return frame


def write_all(fd: int, data: bytes) -> None:
    """Writes every byte to a blocking descriptor."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
