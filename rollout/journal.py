"""Finished episodes on disk as they finish: JSON lines that survive a `kill -9` of the writer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import orjson

from polyturn.agents.episode import Episode, EpisodeTimings, Outcome, TurnRecord
from polyturn.agents.ledger import Segment
from polyturn.tools.metrics import ToolUsage


@dataclass(frozen=True, kw_only=True, slots=True)
class JournalContents:
    """What a journal holds."""

    episodes: tuple[Episode, ...]
    num_truncated: int
    """1 if the writer died in the middle of a line, which is then left out."""


class Journal:
    """One step's journal, open for appending. A line that an earlier writer did not finish is removed."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._file: BinaryIO = path.open("ab")
        end = _end_of_lines(path)
        if end != path.stat().st_size:
            self._file.truncate(end)

    def append(self, episode: Episode) -> None:
        """Write one episode. The line is with the operating system when this returns."""
        self._file.write(encode_episode(episode) + b"\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_journal(path: Path) -> JournalContents:
    """The episodes of a journal; none if there is no file.

    Raises `ValueError` (`path:line`) for a complete line that is not an episode.
    """
    if not path.exists():
        return JournalContents(episodes=(), num_truncated=0)
    lines = path.read_bytes().split(b"\n")
    tail = lines.pop()
    episodes = []
    for number, line in enumerate(lines, start=1):
        try:
            episodes.append(decode_episode(line))
        except (orjson.JSONDecodeError, KeyError, TypeError) as fault:
            raise ValueError(f"{path}:{number}: not an episode: {fault}") from fault
    return JournalContents(episodes=tuple(episodes), num_truncated=int(bool(tail)))


def encode_episode(episode: Episode) -> bytes:
    """An episode as one line of JSON. Floats are written in full, so they come back the same."""
    for segment in episode.segments:
        # JSON has no infinities, and a sampled token has none.
        assert all(-1e30 < value < 1e30 for value in segment.logprobs), (
            f"{episode.episode_id} has a logprob that is not finite"
        )
    return orjson.dumps(episode, default=_plain)


def decode_episode(line: bytes) -> Episode:
    """The episode of one line."""
    fields: dict[str, Any] = orjson.loads(line)
    fields["outcome"] = Outcome(fields["outcome"])
    fields["messages"] = tuple(fields["messages"])
    fields["segments"] = tuple(
        Segment(**{name: _column(value) for name, value in segment.items()}) for segment in fields["segments"]
    )
    fields["turn_records"] = tuple(TurnRecord(**record) for record in fields["turn_records"])
    fields["timings"] = EpisodeTimings(**fields["timings"])
    fields["tools"] = {name: ToolUsage(**usage) for name, usage in fields["tools"].items()}
    return Episode(**fields)


def _column(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _plain(value: Any) -> Any:
    """Mappings that are not dicts."""
    if hasattr(value, "items"):
        return dict(value.items())
    raise TypeError(f"an episode cannot hold a {type(value).__name__}")


def _end_of_lines(path: Path) -> int:
    """The offset after the last newline."""
    content = path.read_bytes()
    return content.rfind(b"\n") + 1
