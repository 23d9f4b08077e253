"""Finished episodes on disk as they finish: records that survive a `kill -9` of the writer, and tell when they do not.

A record is a head and a body. The head tells the body's length and both checksums, and begins with bytes by which a
reader finds the next record behind a damaged one: damage costs the episode that it is in, and is known. The body is
compressed by zstd; in it stand the length of a piece of JSON, the JSON, and the token columns as they are in memory.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import struct
import threading
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import orjson
import pyarrow as pa

from polyturn.agents.episode import Episode, EpisodeTimings, Outcome, TurnRecord
from polyturn.agents.ledger import TOKEN_COLUMNS, Segment
from polyturn.agents.sampling_support import SamplingSupport
from polyturn.rollout.older_formats import JOURNAL_FORMAT, LaterFormat
from polyturn.tools.types import ToolUsage

MARK = b"\xffPT%d" % JOURNAL_FORMAT
"""Begins every record."""
HEAD = struct.Struct("<4sIQQI")
"""The mark, the body's CRC-32, its length, its length when it is no longer compressed, and the CRC-32 of these four."""
HEAD_CHECKED = HEAD.size - 4
JSON_LENGTH = struct.Struct("<Q")


@dataclass(frozen=True, kw_only=True, slots=True)
class JournalContents:
    """What a journal holds."""

    episodes: tuple[Episode, ...]
    damage: tuple[str, ...]
    """A sentence for each record that was changed since it was written; its episode is not among the others."""
    num_truncated: int
    """1 if the writer died in the middle of a record, which is then left out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Record:
    """A run of bytes of a journal."""

    start: int
    end: int
    body: bytes | None
    """The episode, not compressed any more; None where the bytes are not what was written."""
    is_torn: bool = False
    """Whether the file ends in the middle of it, as it does where the writer died."""


class Journal:
    """One step's journal, open for appending, by several threads. What an earlier writer did not finish is removed."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._lock = threading.Lock()
        self._file: BinaryIO = path.open("ab")
        content = path.read_bytes()
        _refuse_later(path, content)
        torn = [record.start for record in _records(content) if record.is_torn]
        if torn:
            self._file.truncate(torn[0])

    def append(self, episode: Episode) -> None:
        """Write one episode. It is with the operating system when this returns.

        Raises:
            OSError: the disk is full, or does not take it; nothing of the episode is left in the journal.
        """
        record = _record_of(episode)
        with self._lock:
            end = self._file.tell()
            try:
                self._file.write(record)
                self._file.flush()
            except OSError:
                self._drop_after(end)
                raise

    def _drop_after(self, end: int) -> None:
        """Begin anew behind what is whole: what the buffer still holds would be written again with the next episode."""
        with contextlib.suppress(OSError):
            self._file.close()
        os.truncate(self.path, end)
        self._file = self.path.open("ab")

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._file.close()


def read_journal(path: Path) -> JournalContents:
    """The episodes of a journal whose bytes are those that were written, and what is damaged; none without a file.

    Raises `LaterFormat` for the journal of a later release.
    """
    found = list(stream_journal(path))
    return JournalContents(
        episodes=tuple(each for each in found if isinstance(each, Episode)),
        damage=tuple(each for each in found if isinstance(each, str)),
        num_truncated=found.count(None),
    )


def stream_journal(path: Path) -> Iterator[Episode | str | None]:
    """What a journal's records hold, one after the other: an episode, a sentence of what is damaged, or None for one
    that its writer did not finish. Nothing without a file; raises as `read_journal`.
    """
    if not path.exists() or path.stat().st_size == 0:
        return
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        _refuse_later(path, content)
        for number, record in enumerate(_records(content), start=1):
            if record.is_torn:
                yield None
                continue
            try:
                if record.body is None:
                    raise ValueError("its checksum does not fit")
                found: Episode | str = decode_episode(record.body)
            except (ValueError, KeyError, TypeError, AssertionError) as fault:
                found = f"{path}: record {number}, bytes {record.start} to {record.end}, is damaged: {fault}"
            yield found


def _refuse_later(path: Path, content: bytes | mmap.mmap) -> None:
    """Raise `LaterFormat` where the first head is sound and has the mark of one: else it would be taken for damage."""
    head, number = content[: HEAD.size], content[len(MARK) - 1 : len(MARK)]
    if len(head) < HEAD.size or not number.isdigit() or int(number) <= JOURNAL_FORMAT:
        return
    if head.startswith(MARK[:-1]) and zlib.crc32(head[:HEAD_CHECKED]) == HEAD.unpack(head)[-1]:
        raise LaterFormat(path, int(number), newest=JOURNAL_FORMAT)


def _record_of(episode: Episode) -> bytes:
    plain = encode_episode(episode)
    body = _codec().compress(plain, asbytes=True)
    head = HEAD.pack(MARK, zlib.crc32(body), len(body), len(plain), 0)[:HEAD_CHECKED]
    return b"".join([head, struct.pack("<I", zlib.crc32(head)), body])


def _codec() -> pa.Codec:
    """A new one each time: a codec is not for several threads."""
    return pa.Codec("zstd", compression_level=1)


def _records(content: bytes | mmap.mmap) -> Iterator[_Record]:
    """The records in their order. Behind a damaged one the reader goes on at the next sound head."""
    start = 0
    while start < len(content):
        head = _sound_head(content, start)
        body_start = start + HEAD.size
        if head is not None:
            checksum, length, plain_length = head
            body = content[body_start : body_start + length]
            if len(body) == length and zlib.crc32(body) == checksum:
                plain = _codec().decompress(body, decompressed_size=plain_length, asbytes=True)
                yield _Record(start=start, end=body_start + length, body=plain)
                start = body_start + length
                continue
        following = _next_head(content, start + 1)
        end = len(content) if following is None else following
        is_short = end < body_start or (head is not None and end < body_start + head[1])
        yield _Record(start=start, end=end, body=None, is_torn=following is None and is_short)
        start = end


def _sound_head(content: bytes | mmap.mmap, start: int) -> tuple[int, int, int] | None:
    """The body's checksum and its two lengths from the head at `start`; None where none is sound."""
    head = content[start : start + HEAD.size]
    if len(head) < HEAD.size or not head.startswith(MARK):
        return None
    _, checksum, length, plain_length, of_head = HEAD.unpack(head)
    return (checksum, length, plain_length) if zlib.crc32(head[:HEAD_CHECKED]) == of_head else None


def _next_head(content: bytes | mmap.mmap, start: int) -> int | None:
    """Where the next sound head begins."""
    while (start := content.find(MARK, start)) >= 0:
        if _sound_head(content, start) is not None:
            return start
        start += 1
    return None


def encode_episode(episode: Episode) -> bytes:
    """An episode as bytes: all but its tokens as JSON, floats in full, and the token columns as they are in memory."""
    columns: list[bytes] = []
    segments: list[dict[str, Any]] = []
    for segment in episode.segments:
        # No sampled token has an infinite one, and what reads trajectories does not expect any.
        assert (np.abs(segment.logprobs) < 1e30).all(), (
            f"{episode.episode_id} has a logprob that is not finite"
        )
        columns += [getattr(segment, name).tobytes() for name in TOKEN_COLUMNS]
        routing = segment.routed_experts
        if routing is not None:
            columns.append(routing.tobytes())
        support = segment.support
        if support is not None:
            columns += [support.sizes.tobytes(), support.token_ids.tobytes()]
        if segment.teacher_logprobs is not None:
            columns.append(segment.teacher_logprobs.tobytes())
        segments.append(
            {
                "role": segment.role,
                "num_tokens": len(segment),
                "routing_width": None if routing is None else routing.shape[1],
                "support_size": None if support is None else len(support.token_ids),
                "is_taught": segment.teacher_logprobs is not None,
            }
        )
    plain = {field.name: getattr(episode, field.name) for field in fields(Episode)}
    text = orjson.dumps({**plain, "segments": segments}, default=_as_dict)
    return b"".join([JSON_LENGTH.pack(len(text)), text, *columns])


def decode_episode(content: bytes) -> Episode:
    """The episode of `encode_episode`."""
    (length,) = JSON_LENGTH.unpack_from(content)
    end = JSON_LENGTH.size + length
    values: dict[str, Any] = orjson.loads(content[JSON_LENGTH.size : end])
    columns = _Columns(content, end)
    values["outcome"] = Outcome(values["outcome"])
    values["messages"] = tuple(values["messages"])
    values["segments"] = tuple(columns.segment(**segment) for segment in values["segments"])
    values["turn_records"] = tuple(TurnRecord(**record) for record in values["turn_records"])
    values["timings"] = EpisodeTimings(**values["timings"])
    values["tools"] = {name: ToolUsage(**usage) for name, usage in values["tools"].items()}
    return Episode(**values)


class _Columns:
    """Reads one column behind the other."""

    def __init__(self, content: bytes, start: int) -> None:
        self._content = content
        self._start = start

    def segment(
        self,
        *,
        role: str,
        num_tokens: int,
        routing_width: int | None,
        support_size: int | None = None,
        is_taught: bool = False,
    ) -> Segment:
        """The next segment, in memory of its own. What has a default is missing in journals of earlier releases."""
        columns = {name: self._take(dtype, num_tokens) for name, dtype in TOKEN_COLUMNS.items()}
        routing = None
        if routing_width is not None:
            routing = self._take(np.int16, num_tokens * routing_width).reshape(num_tokens, routing_width)
        support = None
        if support_size is not None:
            sizes, token_ids = (self._take(np.int32, count) for count in (num_tokens, support_size))
            support = SamplingSupport(sizes=sizes, token_ids=token_ids)
        taught = self._take(np.float32, num_tokens) if is_taught else None
        return Segment(**columns, role=role, routed_experts=routing, support=support, teacher_logprobs=taught)

    def _take(self, dtype: type[np.generic], count: int) -> Any:
        column = np.frombuffer(self._content, dtype=dtype, count=count, offset=self._start).copy()
        self._start += column.nbytes
        return column


def _as_dict(value: Any) -> Any:
    """Mappings that are not dicts."""
    if hasattr(value, "items"):
        return dict(value.items())
    raise TypeError(f"an episode cannot hold a {type(value).__name__}")
