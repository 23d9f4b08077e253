"""Finished episodes on disk as they finish: records that survive a `kill -9` of the writer, and tell when they do not.

A record is a line of JSON behind its checksum: damage to the file costs the episode that it is in, and is known.
"""

from __future__ import annotations

import contextlib
import os
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import orjson

from polyturn.agents.episode import Episode, EpisodeTimings, Outcome, TurnRecord
from polyturn.agents.ledger import Segment
from polyturn.tools.types import ToolUsage


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
    """Behind its last byte, before the newline."""
    body: bytes | None
    """The episode's line; None where the bytes are not what was written."""
    complete: bool = True
    """Whether anything follows it: what the writer died in ends with the file."""


class Journal:
    """One step's journal, open for appending. A record that an earlier writer did not finish is removed."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._file: BinaryIO = path.open("ab")
        content = path.read_bytes()
        *_, last = [_Record(start=0, end=0, body=b""), *_records(content)]
        if not last.complete:
            self._file.truncate(last.start)
        elif content and not content.endswith(b"\n"):
            self._file.write(b"\n")

    def append(self, episode: Episode) -> None:
        """Write one episode. It is with the operating system when this returns.

        Raises:
            OSError: the disk is full, or does not take it; nothing of the episode is left in the journal.
        """
        body = encode_episode(episode)
        end = self._file.tell()
        try:
            self._file.write(_head(body) + body + b"\n")
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
        self._file.close()


def read_journal(path: Path) -> JournalContents:
    """The episodes of a journal whose bytes are those that were written, and what is damaged; none without a file."""
    if not path.exists():
        return JournalContents(episodes=(), damage=(), num_truncated=0)
    episodes, damage, num_truncated = [], [], 0
    for number, record in enumerate(_records(path.read_bytes()), start=1):
        try:
            if record.body is None:
                raise ValueError("its checksum does not fit")
            episodes.append(decode_episode(record.body))
        except (ValueError, KeyError, TypeError, AssertionError) as fault:
            if not record.complete:
                num_truncated = 1
                continue
            damage.append(
                f"{path}: record {number}, bytes {record.start} to {record.end}, is damaged: {fault}"
            )
    return JournalContents(episodes=tuple(episodes), damage=tuple(damage), num_truncated=num_truncated)


def _head(body: bytes) -> bytes:
    """What stands before an episode's line: the CRC-32 of the line, its length, and the CRC-32 of the two."""
    head = b"%08x %x " % (zlib.crc32(body), len(body))
    return head + b"%08x " % zlib.crc32(head)


def _records(content: bytes) -> Iterator[_Record]:
    """The records in their order. A sound one is found by its length, so that no newline need be right.

    Behind a damaged one the reader goes on at the next line.
    """
    start = 0
    while start < len(content):
        body_start, body = _sound_body(content, start)
        if body is not None:
            end = body_start + len(body)
            yield _Record(start=start, end=end, body=body)
        else:
            newline = content.find(b"\n", start)
            end = len(content) if newline < 0 else newline
            if end > start:
                yield _Record(start=start, end=end, body=None, complete=newline >= 0)
        start = end + 1


def _sound_body(content: bytes, start: int) -> tuple[int, bytes | None]:
    """Where the line of the record at `start` begins, and the line; None where a checksum does not fit."""
    found = _HEAD.match(content, start)
    if found is None or zlib.crc32(found[1]) != int(found[4], 16):
        return start, None
    body = content[found.end() : found.end() + int(found[3], 16)]
    return found.end(), body if zlib.crc32(body) == int(found[2], 16) else None


_HEAD = re.compile(rb"(([0-9a-f]{8}) ([0-9a-f]+) )([0-9a-f]{8}) ")


def encode_episode(episode: Episode) -> bytes:
    """An episode as one line of JSON. Floats are written in full, so they come back the same."""
    for segment in episode.segments:
        # JSON has no infinities, and a sampled token has none.
        assert (abs(segment.logprobs) < 1e30).all(), f"{episode.episode_id} has a logprob that is not finite"
    return orjson.dumps(episode, default=_plain, option=orjson.OPT_SERIALIZE_NUMPY)


def decode_episode(line: bytes) -> Episode:
    """The episode of one line."""
    fields: dict[str, Any] = orjson.loads(line)
    fields["outcome"] = Outcome(fields["outcome"])
    fields["messages"] = tuple(fields["messages"])
    fields["segments"] = tuple(
        Segment(**{**segment, "routed_experts": _routing(segment["routed_experts"])})
        for segment in fields["segments"]
    )
    fields["turn_records"] = tuple(TurnRecord(**record) for record in fields["turn_records"])
    fields["timings"] = EpisodeTimings(**fields["timings"])
    fields["tools"] = {name: ToolUsage(**usage) for name, usage in fields["tools"].items()}
    return Episode(**fields)


def _routing(rows: list[list[int]] | None) -> npt.NDArray[np.int16] | None:
    return None if rows is None else np.array(rows, dtype=np.int16)


def _plain(value: Any) -> Any:
    """Mappings that are not dicts."""
    if hasattr(value, "items"):
        return dict(value.items())
    raise TypeError(f"an episode cannot hold a {type(value).__name__}")
