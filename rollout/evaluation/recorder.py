"""Writes an evaluation's directory as episodes end: the trajectory first, then the line that says what came of it.

Both are written by one thread, so that a trajectory has its line, or the writer was killed between the two: then the
next sitting finds the trajectory, and writes the line.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow.parquet as pq

from polyturn.agents.episode import Episode
from polyturn.rollout.evaluation.directory import (
    EpisodeLog,
    Place,
    entry_directory,
    newest_lines,
    place_of,
)
from polyturn.rollout.evaluation.records import Failure, ScoredEpisode
from polyturn.rollout.evaluation.scoring import Prices, failure_of, played_place, scored
from polyturn.rollout.groups import parse_episode_id
from polyturn.rollout.store import UNREADABLE, TrajectoryStore

EPISODES_PER_FILE = 2_048
"""Attempts in one journal, which becomes one columnar file."""


class Recorder:
    """An evaluation's directory, open for writing; a context manager that leaves columnar files.

    `lines` has the line that holds of each place that has one.
    """

    def __init__(
        self,
        directory: Path,
        names: Sequence[str],
        *,
        prices: Prices | None,
        episodes_per_file: int = EPISODES_PER_FILE,
    ) -> None:
        """Read what is there already, and give lines to what has none. `names` are those of the entries."""
        self._prices = prices
        self._episodes_per_file = episodes_per_file
        self._log = EpisodeLog(directory)
        self._writer = ThreadPoolExecutor(1, "evaluation")
        self._entries = {name: _EntryFiles(entry_directory(directory, name)) for name in names}
        self.lines: dict[Place, ScoredEpisode] = newest_lines(directory)
        self._next_attempt: dict[Place, int] = {}
        for line in self.lines.values():
            self._count(line.entry, line.episode_id)
        for name, files in self._entries.items():
            for identity in files.episode_ids():
                self._count(name, identity)
            self._recover(name, files)
            files.settle()

    def next_attempt(self, place: Place) -> int:
        """The number of the next attempt of a place: no two have the same."""
        return self._next_attempt.get(place, 0)

    async def keep(self, name: str, episode: Episode, *, is_final: bool) -> ScoredEpisode | None:
        """Keep an attempt; the line that it has where no other will be made of its place in this sitting."""
        line = scored(episode, entry=name, prices=self._prices) if is_final else None
        loop = asyncio.get_running_loop()
        await asyncio.shield(loop.run_in_executor(self._writer, self.write, name, episode, line))
        return line

    def write(self, name: str, episode: Episode, line: ScoredEpisode | None) -> None:
        """The same at once, with a line of one's own."""
        files = self._entries[name]
        files.append(episode)
        self._count(name, episode.episode_id)
        if line is not None:
            self.say(line)
        if files.num_open >= self._episodes_per_file:
            files.turn_over()

    def say(self, line: ScoredEpisode) -> None:
        """Write a line of an episode whose trajectory is there."""
        self._log.append(line)
        self.lines[place_of(line)] = line

    def close(self) -> None:
        """Finish what is being written, and make columnar files of all journals."""
        self._writer.shutdown()
        self._log.close()
        for files in self._entries.values():
            files.close()

    def _count(self, name: str, identity: str) -> None:
        group_id, sample, attempt = parse_episode_id(identity)
        place = (name, int(group_id.removeprefix("eval")), sample)
        self._next_attempt[place] = max(self._next_attempt.get(place, 0), attempt + 1)

    def _recover(self, name: str, files: _EntryFiles) -> None:
        """Give lines to episodes that were played to their end as the writer was killed."""
        for episode in files.journaled():
            task_index, sample, _ = played_place(episode)
            known = self.lines.get((name, task_index, sample))
            if known is not None and episode.episode_id == known.episode_id:
                continue
            is_scored = known is not None and known.failure is Failure.NONE
            if not is_scored and failure_of(episode) is not Failure.INFRASTRUCTURE:
                self.say(scored(episode, entry=name, prices=self._prices))


class _EntryFiles:
    """The trajectories of one entry, in files of bounded size."""

    def __init__(self, directory: Path) -> None:
        self._store = TrajectoryStore(directory)
        self._number = max(self._store.begun_after(-1), default=-1) + 1
        self.num_open = 0
        """Attempts in the newest journal."""

    def append(self, episode: Episode) -> None:
        """Keep an attempt in the newest journal."""
        self._store.journal(self._number, episode)
        self.num_open += 1

    def turn_over(self) -> None:
        """Make a columnar file of the newest journal, and begin another one."""
        self.settle()
        self._number += 1
        self.num_open = 0

    def settle(self) -> None:
        """Make columnar files of all journals."""
        for number in self._journals():
            self._store.write_step(number, self._store.journaled(number))
            self._store.forget(number)

    def journaled(self) -> Iterator[Episode]:
        """What stands in journals that no columnar file was made of."""
        for number in self._journals():
            yield from self._store.journaled(number)

    def episode_ids(self) -> Iterator[str]:
        """Of all attempts, but those of files that are damaged."""
        for number in self._store.steps():
            if not self._store.journal_path(number).exists():
                with contextlib.suppress(*UNREADABLE):
                    yield from pq.read_table(self._store.path(number), columns=["episode_id"])[0].to_pylist()
        for episode in self.journaled():
            yield episode.episode_id

    def close(self) -> None:
        """Leave columnar files alone."""
        self.settle()
        self._store.close()

    def _journals(self) -> list[int]:
        return [number for number in self._store.begun_after(-1) if self._store.journal_path(number).exists()]
