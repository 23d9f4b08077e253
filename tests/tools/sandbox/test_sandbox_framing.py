"""Frames come out as they went in, however the stream cuts them, and what is not a frame is refused."""

import json
import struct

import pytest

from polyturn.tools.sandbox.runner.framing import Decoder, FramingError, encode


@pytest.mark.parametrize("size", [1, 3, 7, 1000])
def test_round_trip(size):
    frames = [({"op": "exec", "code": "ä" * 50}, b"body"), ({}, b""), ({"x": [1]}, bytes(range(256)))]
    stream = b"".join(encode(*frame) for frame in frames)
    decoder = Decoder()
    decoded = []
    for start in range(0, len(stream), size):
        decoder.feed(stream[start : start + size])
        while (frame := decoder.next_frame()) is not None:
            decoded.append(frame)
    assert decoded == frames


@pytest.mark.parametrize(
    "stream",
    [
        struct.pack(">II", 1001, 0),
        struct.pack(">II", 2, 11),
        struct.pack(">II", 3, 0) + b"{x}",
        struct.pack(">II", 2, 0) + b"[]",
        struct.pack(">II", 2, 0) + b"\xff\xff",
    ],
    ids=["header too large", "body too large", "no JSON", "no object", "no UTF-8"],
)
def test_what_is_not_a_frame(stream):
    decoder = Decoder(max_header_bytes=1000, max_body_bytes=10)
    decoder.feed(stream)
    with pytest.raises(FramingError):
        decoder.next_frame()


def test_too_large_is_refused_before_it_arrives():
    decoder = Decoder(max_header_bytes=1000, max_body_bytes=10)
    decoder.feed(struct.pack(">II", 2, 1 << 31))
    with pytest.raises(FramingError, match=str(1 << 31)):
        decoder.next_frame()


def test_headers_are_json():
    text = encode({"a": 1})[8:]
    assert json.loads(text) == {"a": 1}
