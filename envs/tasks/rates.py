"""How often each task was solved: what a probe wrote of it, and what the run itself has seen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import orjson

from polyturn.envs.messages import TaskSource
from polyturn.envs.tasks.order import task_digest

ROUNDING = 1e-6
"""Rewards are sums of floats: what falls short of the success reward by no more is a success."""
MAX_LOOKED_UP = 10_000_000
"""A source of more tasks than this is not searched for those of a file."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Difficulty:
    """How a policy did on one task: a line of a file of difficulties."""

    task_id: str
    digest: str
    """As `task_digest` makes it: the same id may come to mean another task."""
    num_episodes: int
    """That did not fail."""
    num_successes: int
    mean_reward: float
    """Of no episodes 0."""

    def to_line(self) -> bytes:
        """As JSON, with its success rate."""
        rate = self.num_successes / self.num_episodes if self.num_episodes else None
        return orjson.dumps({**asdict(self), "success_rate": rate}) + b"\n"


def read_difficulties(path: Path) -> list[Difficulty]:
    """The lines of a file of difficulties; a last line that was cut short is left out.

    Raises:
        ValueError: there is no such file, or a line of it is none.
    """
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    found = []
    for number, line in enumerate(lines, start=1):
        if number == len(lines) and not line.endswith(b"\n"):
            break
        found.append(_difficulty(line, f"{path}:{number}"))
    return found


def _difficulty(line: bytes, where: str) -> Difficulty:
    try:
        row = orjson.loads(line)
        row.pop("success_rate", None)
        found = Difficulty(**row)
    except (orjson.JSONDecodeError, TypeError, AttributeError) as error:
        raise ValueError(f"{where}: no line of `polyturn probe`: {error}") from error
    counts = (found.num_successes, found.num_episodes)
    if not all(isinstance(count, int) for count in counts) or not 0 <= counts[0] <= counts[1]:
        raise ValueError(f"{where}: {counts[0]} successes of {counts[1]} episodes cannot be")
    return found


@dataclass(slots=True)
class _Seen:
    """Episodes of one task, older ones weighing less."""

    weight: float = 0.0
    successes: float = 0.0
    num_episodes: int = 0


class SuccessRates:
    """The success rate of every task that anything is known of, by its index in the source."""

    def __init__(self, *, success_reward: float = 1.0, memory: float = 0.5) -> None:
        """The options of `curriculum`."""
        self._least = success_reward - ROUNDING
        self._memory = memory
        self._seen: dict[int, _Seen] = {}

    def rate(self, task_index: int) -> float | None:
        """The share of a task's episodes that were successes, newer ones weighing more; None: nothing is known."""
        seen = self._seen.get(task_index)
        return None if seen is None or not seen.weight else seen.successes / seen.weight

    def num_episodes(self, task_index: int) -> int:
        """How many episodes of a task are known."""
        seen = self._seen.get(task_index)
        return 0 if seen is None else seen.num_episodes

    def known(self) -> Iterator[int]:
        """The tasks that have a rate, in their order."""
        return iter(sorted(index for index, seen in self._seen.items() if seen.weight))

    def observe(self, task_index: int, rewards: Sequence[float]) -> None:
        """Take in the rewards of a new group of a task; none, where all its episodes failed, changes nothing."""
        if rewards:
            self._add(task_index, sum(reward >= self._least for reward in rewards), len(rewards))

    def begin_with(self, tasks: TaskSource, difficulties: Sequence[Difficulty]) -> int:
        """Take in what a probe found; of how many tasks of the source it knew.

        A line counts for the task with its id and digest: a task that was changed since begins without a rate.

        Raises:
            ValueError: the source is too large, or endless, to be searched.
        """
        if len(tasks) > MAX_LOOKED_UP:
            raise ValueError(
                f"a source of more than {MAX_LOOKED_UP:,} tasks is not searched for those of a file"
            )
        by_task = {(found.task_id, found.digest): found for found in difficulties}
        ids = {found.task_id for found in difficulties}
        num_known = 0
        for index in range(len(tasks)):
            task = tasks[index]
            found = by_task.get((task.task_id, task_digest(task))) if task.task_id in ids else None
            if found is not None and found.num_episodes:
                self._add(index, found.num_successes, found.num_episodes)
                num_known += 1
        return num_known

    def state(self) -> dict[str, list[float]]:
        """By task index, for JSON."""
        return {str(index): [s.weight, s.successes, s.num_episodes] for index, s in self._seen.items()}

    def restore(self, state: Mapping[str, Sequence[Any]]) -> None:
        """Know what `state` says, and nothing else."""
        self._seen = {
            int(index): _Seen(float(weight), float(successes), int(num_episodes))
            for index, (weight, successes, num_episodes) in state.items()
        }

    def _add(self, task_index: int, num_successes: int, num_episodes: int) -> None:
        seen = self._seen.setdefault(task_index, _Seen())
        seen.weight = seen.weight * self._memory + num_episodes
        seen.successes = seen.successes * self._memory + num_successes
        seen.num_episodes += num_episodes
