"""Evaluation on held-out tasks: the mean score with a 95 % interval; what failed is counted, never scored."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from polyturn.agents.episode import Episode
from polyturn.agents.ledger import UNSAMPLED_VERSION
from polyturn.configs.schema.run import RunConfig
from polyturn.rollout.collection import play_groups
from polyturn.rollout.engines.launch import Engines, LocalLauncher
from polyturn.rollout.engines.server import EngineSpec
from polyturn.rollout.evaluation.statistics import finite_mean, interval
from polyturn.rollout.groups import Group, Prompt
from polyturn.rollout.player import EpisodePlayer, RolloutError
from polyturn.rollout.user_faults import user_fault_share

Keep = Callable[[Episode], Awaitable[None]]
Tell = Callable[[Episode], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationResult:
    """How a policy did on held-out tasks. The score of an episode is its reward."""

    mean: float
    """Over tasks, of each task's mean: a task counts the same however many of its episodes failed."""
    low: float
    high: float
    """The 95 % interval, by `method`."""
    method: Literal["wilson", "student", "combined", "none"]
    """As `statistics.Interval`. `none`: low and high are the mean."""
    num_tasks: int
    """Tasks with at least one episode that did not fail."""
    num_episodes: int
    num_failed: int
    """Episodes that failed for good: excluded from everything above."""
    num_truncated: int
    """Episodes that a limit ended."""
    mean_turns: float
    oldest_version: int = UNSAMPLED_VERSION
    newest_version: int = UNSAMPLED_VERSION
    """Of the policy, behind the sampled tokens: the same unless the weights changed meanwhile; -1 where no tokens are
    recorded."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """What environments and policies counted, such as tokens of an endpoint: the means over episodes that have it."""
    user_fault_share: float = 0.0
    """Of the episodes with a simulated user that did not succeed, the share in which that had broken its script; 0
    where there is none."""
    num_user_faults: int = 0
    """Attempts that failed because a simulated user could not be played: excluded from everything above."""
    policy: str = "model"
    """Who played: the model that was served, or the label of a policy that was named."""

    @property
    def sentence(self) -> str:
        """For people."""
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}] on {self.num_tasks} tasks"


async def evaluate(
    *,
    player: EpisodePlayer,
    policy: Any,
    num_tasks: int,
    samples_per_task: int = 1,
    keep: Callable[[Episode], Awaitable[None]] | None = None,
    on_episode: Callable[[Episode], None] | None = None,
    stop: asyncio.Event | None = None,
) -> EvaluationResult:
    """Play the first `num_tasks` tasks of the player's source, all of them if there are fewer.

    The tasks and seeds are the same in every call, so results before and after training are paired. `policy` is what
    the player's episodes are played with.

    Raises:
        RolloutError: every episode failed, or the evaluation was stopped before it was complete.
    """
    groups = await play_groups(
        player,
        evaluation_prompts(min(num_tasks, len(player.tasks))),
        samples_per_prompt=samples_per_task,
        policy=policy,
        keep=keep,
        on_episode=on_episode,
        stop=stop,
    )
    if num_missing := sum(group.num_missing for group in groups):
        raise RolloutError(f"the evaluation was stopped with {num_missing} episodes to go")
    return summarise(groups)


def evaluation_prompts(num_tasks: int) -> list[Prompt]:
    """The tasks in order, each once."""
    return [
        Prompt(task_index=index, epoch=0, position=index, group_id=f"eval{index:06d}")
        for index in range(num_tasks)
    ]


def summarise(groups: Sequence[Group]) -> EvaluationResult:
    """Score the groups, one per task. Raises `ValueError` when no episode survived."""
    scores = [
        [episode.reward for episode in group.episodes if episode.reward is not None] for group in groups
    ]
    scores = [task for task in scores if task]
    episodes = [episode for group in groups for episode in group.episodes]
    versions = {
        int(bound)
        for episode in episodes
        for segment in episode.segments
        if segment.num_sampled
        for bound in _bounds(segment.policy_versions[segment.sampled])
    }
    if not scores:
        raise ValueError("no episode of the evaluation survived, so there is nothing to score")
    found = interval(scores)
    return EvaluationResult(
        mean=found.mean,
        low=found.mean if found.low is None else found.low,
        high=found.mean if found.high is None else found.high,
        method=found.method,
        num_tasks=len(scores),
        num_episodes=len(episodes),
        num_failed=sum(group.num_dropped for group in groups),
        num_truncated=sum(episode.outcome == "truncated" for episode in episodes),
        mean_turns=fmean(episode.num_turns for episode in episodes),
        metrics=mean_metrics(episodes),
        user_fault_share=user_fault_share(episodes) or 0.0,
        num_user_faults=sum(group.num_user_faults for group in groups),
        oldest_version=min(versions, default=UNSAMPLED_VERSION),
        newest_version=max(versions, default=UNSAMPLED_VERSION),
    )


def mean_metrics(episodes: Sequence[Episode]) -> dict[str, float]:
    """By name what episodes counted: the mean over those that have it."""
    names = sorted({name for episode in episodes for name in episode.metrics})
    return {
        name: finite_mean([episode.metrics[name] for episode in episodes if name in episode.metrics])
        for name in names
    }


def _bounds(versions: npt.NDArray[np.int32]) -> tuple[np.int32, np.int32]:
    return versions.min(), versions.max()


def local_engines(config: RunConfig, *, model_path: Path, log_directory: Path) -> Engines:
    """The config's engines on this machine, serving a Hugging Face directory; a context manager."""
    spec = EngineSpec.from_config(config, model_path=model_path, log_directory=log_directory)
    return Engines(spec, LocalLauncher(spec))
