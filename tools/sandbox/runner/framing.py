"""Frames on a stream of bytes: lengths, a JSON header, a body. Both ends use this module."""

from __future__ import annotations

import json
import os
import struct
from typing import Any

LENGTHS = struct.Struct(">II")
MAX_HEADER_BYTES = 64 << 20
"""A program's header holds the code to run, so it may be long; the bound keeps a broken stream from claiming memory."""


class FramingError(Exception):
    """The stream does not carry frames, or one that is larger than the reader allows."""


def encode(header: dict[str, Any], body: bytes = b"") -> bytes:
    """One frame."""
    return encode_header(header, len(body)) + body


def encode_header(header: dict[str, Any], body_bytes: int) -> bytes:
    """The beginning of a frame, which a body of so many bytes is to follow."""
    text = json.dumps(header).encode()
    return LENGTHS.pack(len(text), body_bytes) + text


def decode(data: bytes) -> dict[str, Any]:
    """The header of the one frame that `data` is. Raises FramingError."""
    decoder = Decoder()
    decoder.feed(data)
    frame = decoder.next_frame()
    if frame is None:
        raise FramingError("a frame was cut off")
    return frame[0]


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
        header = _parse(self._buffer[LENGTHS.size : start])
        body = bytes(self._buffer[start:end])
        del self._buffer[:end]
        return header, body


def read_header(fd: int) -> tuple[dict[str, Any], int]:
    """Waits for the beginning of a frame; the header, and how many bytes of body are still to be read.

    Not a byte more is read. Raises EOFError when the stream ends, FramingError where it carries no frames.
    """
    header_bytes, body_bytes = LENGTHS.unpack(read_exactly(fd, LENGTHS.size))
    if header_bytes > MAX_HEADER_BYTES or body_bytes > MAX_HEADER_BYTES:
        raise FramingError(f"a frame of {header_bytes} + {body_bytes} bytes is larger than allowed")
    return _parse(read_exactly(fd, header_bytes)), body_bytes


def read_exactly(fd: int, size: int) -> bytes:
    """So many bytes. Raises EOFError where the stream ends before."""
    data = bytearray()
    while len(data) < size:
        more = os.read(fd, size - len(data))
        if not more:
            raise EOFError
        data += more
    return bytes(data)


def _parse(text: bytes | bytearray) -> dict[str, Any]:
    try:
        header = json.loads(text)
    except ValueError as error:
        raise FramingError(f"a header is not JSON: {error}") from None
    if not isinstance(header, dict):
        raise FramingError("a header is not an object")
    return header


def write_all(fd: int, data: bytes | memoryview) -> None:
    """Writes every byte to a blocking descriptor."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
