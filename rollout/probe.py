"""How difficult each task is for a policy: every task is played some times, and a file says how often it was solved."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from types import TracebackType
from typing import Self

from polyturn.agents.episode import Episode, Outcome
from polyturn.agents.policy import Policy
from polyturn.configs.schema.run import RunConfig
from polyturn.envs.messages import Task, TaskSource
from polyturn.envs.tasks.order import task_digest
from polyturn.envs.tasks.rates import ROUNDING, Difficulty, read_difficulties
from polyturn.rollout.collection import play_groups
from polyturn.rollout.engines.groups import judged
from polyturn.rollout.evaluation.held_out import local_engines
from polyturn.rollout.factory import build_player, open_policy, training_sampling
from polyturn.rollout.groups import Prompt
from polyturn.rollout.player import EpisodePlayer
from polyturn.rollout.whole_file import whole_file

TASKS_AT_ONCE = 1024
"""So many are handed to the collector together: enough to keep engines busy, few enough to be held."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbeResult:
    """How a policy did on the tasks of a file, over all sessions that wrote it."""

    num_tasks: int
    """Tasks with an episode that did not fail."""
    num_unknown: int
    """Tasks whose episodes all failed: nothing is known of them."""
    never: int
    """Tasks that were never solved."""
    sometimes: int
    """Tasks that were solved in some of their episodes."""
    always: int
    """Tasks that were always solved."""

    @classmethod
    def of(cls, difficulties: Sequence[Difficulty]) -> ProbeResult:
        """The counts of a file's lines."""
        known = [found for found in difficulties if found.num_episodes]
        never = sum(found.num_successes == 0 for found in known)
        always = sum(found.num_successes == found.num_episodes for found in known)
        return cls(
            num_tasks=len(known),
            num_unknown=len(difficulties) - len(known),
            never=never,
            sometimes=len(known) - never - always,
            always=always,
        )


async def probe(
    *,
    player: EpisodePlayer,
    policy: Policy,
    task_indices: Sequence[int],
    samples_per_task: int,
    success_reward: float,
    write: Callable[[Difficulty], None],
    on_episode: Callable[[Episode], None] | None = None,
) -> None:
    """Play tasks; `write` gets the line of each, as soon as all its episodes have ended.

    Raises:
        RolloutError: every episode of many tasks failed.
    """
    survivors: dict[str, list[Episode]] = {}

    def note(episode: Episode) -> None:
        if on_episode is not None:
            on_episode(episode)
        if episode.outcome is Outcome.FAILED:
            return
        of_task = survivors.setdefault(episode.group_id, [])
        of_task.append(episode)
        if len(of_task) == samples_per_task:
            del survivors[episode.group_id]
            write(difficulty_of(player.tasks[_index(episode.group_id)], of_task, success_reward))

    for start in range(0, len(task_indices), TASKS_AT_ONCE):
        groups = await play_groups(
            player,
            [_prompt(index) for index in task_indices[start : start + TASKS_AT_ONCE]],
            samples_per_prompt=samples_per_task,
            policy=policy,
            on_episode=note,
        )
        for group in groups:
            if len(group.episodes) < samples_per_task:
                task = player.tasks[group.prompt.task_index]
                write(difficulty_of(task, group.episodes, success_reward))


def difficulty_of(task: Task, episodes: Sequence[Episode], success_reward: float) -> Difficulty:
    """The line of a task, of its episodes that did not fail."""
    rewards = [episode.reward for episode in episodes if episode.reward is not None]
    return Difficulty(
        task_id=task.task_id,
        digest=task_digest(task),
        num_episodes=len(rewards),
        num_successes=sum(reward >= success_reward - ROUNDING for reward in rewards),
        mean_reward=fmean(rewards) if rewards else 0.0,
    )


def left_to_probe(tasks: TaskSource, num_tasks: int, path: Path) -> list[int]:
    """The first `num_tasks` tasks of a source but for those of which a file knows something.

    Raises:
        ValueError: the file is no file of difficulties.
    """
    written = read_difficulties(path) if path.exists() else []
    known = {(found.task_id, found.digest) for found in written if found.num_episodes}
    looked_at = range(min(num_tasks, len(tasks)))
    return [index for index in looked_at if not known or _identity(tasks[index]) not in known]


def probe_model(
    config: RunConfig,
    *,
    model_path: Path,
    output: Path,
    num_tasks: int,
    samples_per_task: int,
    on_begin: Callable[[int], None] | None = None,
    on_episode: Callable[[Episode], None] | None = None,
) -> ProbeResult:
    """Serve a Hugging Face directory, play the tasks that are trained on, and write their difficulties to `output`.

    Lines of tasks that the file has already stay, and those tasks are not played again.

    Args:
        on_begin: is told how many tasks are to be played.

    Raises:
        ValueError: `output` is no file of difficulties.
        RolloutError: every episode failed.
    """
    with (
        tempfile.TemporaryDirectory(prefix="polyturn-probe-") as scratch,
        judged(config, log_directory=Path(scratch)) as graded,
        closing(
            build_player(
                graded,
                model_path=model_path,
                split=config.environment.train_split,
                sampling=training_sampling(config, model_path=model_path),
            )
        ) as player,
    ):

        async def play(
            url: Sequence[str] | str, indices: Sequence[int], write: Callable[[Difficulty], None]
        ) -> None:
            async with open_policy(config, model_path=model_path, url=url) as policy, player.serves:
                await probe(
                    player=player,
                    policy=policy,
                    task_indices=indices,
                    samples_per_task=samples_per_task,
                    success_reward=config.curriculum.success_reward,
                    write=write,
                    on_episode=on_episode,
                )

        indices = left_to_probe(player.tasks, num_tasks, output)
        if on_begin is not None:
            on_begin(len(indices))
        if indices:
            with (
                DifficultyFile(output) as file,
                local_engines(config, model_path=model_path, log_directory=Path(scratch)) as engines,
            ):
                asyncio.run(play(engines.request_urls, indices, file.write))
    return ProbeResult.of(read_difficulties(output))


class DifficultyFile:
    """A file of difficulties, to which lines are appended; a context manager."""

    def __init__(self, path: Path) -> None:
        """What a crash left of a last line goes, and so do lines that know of no episode."""
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [found for found in read_difficulties(path) if found.num_episodes] if path.exists() else []
        with whole_file(path) as file:
            file.write(b"".join(found.to_line() for found in kept))
        self._file = path.open("ab")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def write(self, found: Difficulty) -> None:
        """Append a line; it is with the operating system when this returns."""
        self._file.write(found.to_line())
        self._file.flush()


PREFIX = "probe"


def _prompt(index: int) -> Prompt:
    return Prompt(task_index=index, epoch=0, position=index, group_id=f"{PREFIX}{index:08d}")


def _index(group_id: str) -> int:
    return int(group_id.removeprefix(PREFIX))


def _identity(task: Task) -> tuple[str, str]:
    return task.task_id, task_digest(task)
