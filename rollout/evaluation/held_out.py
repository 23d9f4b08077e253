"""Evaluation on held-out tasks: the mean score with a 95 % interval; what failed is counted, never scored."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from polyturn.agents.episode import Episode
from polyturn.agents.ledger import UNSAMPLED_VERSION
from polyturn.agents.policies.named import make_policy
from polyturn.configs.schema.run import RunConfig
from polyturn.rollout.collection import play_groups
from polyturn.rollout.engines.groups import judged
from polyturn.rollout.engines.launch import Engines, LocalLauncher
from polyturn.rollout.engines.server import EngineSpec
from polyturn.rollout.evaluation.statistics import interval
from polyturn.rollout.factory import build_player, evaluation_sampling, open_policy
from polyturn.rollout.groups import Group, Prompt
from polyturn.rollout.named_play import ModelEpisodes, PolicyChoice, named_player
from polyturn.rollout.player import EpisodePlayer, RolloutError
from polyturn.rollout.store import TrajectoryStore
from polyturn.rollout.user_faults import user_fault_share

Keep = Callable[[Episode], Awaitable[None]]
Tell = Callable[[Episode], None]
EVALUATION_STEP = 0
"""The step under which a stand-alone evaluation files its trajectories."""


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
        name: fmean(episode.metrics[name] for episode in episodes if name in episode.metrics)
        for name in names
    }


def _bounds(versions: npt.NDArray[np.int32]) -> tuple[np.int32, np.int32]:
    return versions.min(), versions.max()


def local_engines(config: RunConfig, *, model_path: Path, log_directory: Path) -> Engines:
    """The config's engines on this machine, serving a Hugging Face directory; a context manager."""
    spec = EngineSpec.from_config(config, model_path=model_path, log_directory=log_directory)
    return Engines(spec, LocalLauncher(spec))


def evaluate_model(
    config: RunConfig,
    *,
    model_path: Path,
    policy: PolicyChoice | None = None,
    directory: Path | None = None,
    on_episode: Callable[[Episode], None] | None = None,
) -> EvaluationResult:
    """Serve a Hugging Face directory, evaluate it on the config's held-out tasks, and stop the engines.

    With `directory`, trajectories and the engines' logs are kept there. With `policy`, one that is made of the model
    plays in its place.
    """
    settings = config.evaluation
    sampling = evaluation_sampling(settings)
    with tempfile.TemporaryDirectory(prefix="polyturn-evaluation-") as scratch:
        kept = directory or Path(scratch)
        with judged(config, log_directory=kept / "logs") as config:
            if policy is None:
                player = build_player(config, model_path=model_path, split=settings.split, sampling=sampling)
            else:
                player = named_player(config)

            async def play(url: str | Sequence[str], keep: Keep, tell: Tell) -> EvaluationResult:
                async with open_policy(config, model_path=model_path, url=url) as fleet, player.serves:
                    if policy is None:
                        return await _evaluate(config, player, fleet, keep, tell)
                    model = ModelEpisodes(config, model_path=model_path, policy=fleet, sampling=sampling)
                    named = make_policy(policy.name, policy.options, model=model)
                    async with aclosing(named):
                        result = await _evaluate(config, player, named, keep, tell)
                    return replace(result, policy=named.label)

            with (
                closing(player),
                _kept(kept, on_episode) as (keep, tell),
                local_engines(config, model_path=model_path, log_directory=kept / "logs") as engines,
            ):
                return asyncio.run(play(engines.request_urls, keep, tell))


def evaluate_policy(
    config: RunConfig,
    policy: PolicyChoice,
    *,
    directory: Path | None = None,
    on_episode: Callable[[Episode], None] | None = None,
) -> EvaluationResult:
    """Evaluate a policy that no model is served for: an endpoint, a script, a person. See `evaluate_model`.

    Raises `ValueError` where it cannot be had, or cannot play the environment.
    """
    named = make_policy(policy.name, policy.options)

    async def play(player: EpisodePlayer, keep: Keep, tell: Tell) -> EvaluationResult:
        async with aclosing(named):
            result = await _evaluate(config, player, named, keep, tell)
        return replace(result, policy=named.label)

    with tempfile.TemporaryDirectory(prefix="polyturn-evaluation-") as scratch:
        kept = directory or Path(scratch)
        with (
            judged(config, log_directory=kept / "logs") as graded,
            closing(named_player(graded, max_at_once=named.max_at_once)) as player,
            _kept(kept, on_episode) as (keep, tell),
        ):
            return asyncio.run(play(player, keep, tell))


async def _evaluate(
    config: RunConfig, player: EpisodePlayer, policy: Any, keep: Keep, tell: Tell
) -> EvaluationResult:
    settings = config.evaluation
    return await evaluate(
        player=player,
        policy=policy,
        num_tasks=settings.num_tasks,
        samples_per_task=settings.samples_per_task,
        keep=keep,
        on_episode=tell,
    )


@contextmanager
def _kept(directory: Path, on_episode: Callable[[Episode], None] | None) -> Iterator[tuple[Keep, Tell]]:
    """What keeps the episodes of an evaluation as they end, and as one file at its end."""
    store = TrajectoryStore(directory)
    episodes: list[Episode] = []

    def tell(episode: Episode) -> None:
        episodes.append(episode)
        if on_episode is not None:
            on_episode(episode)

    try:
        yield partial(store.keep, EVALUATION_STEP), tell
        store.write_step(EVALUATION_STEP, episodes)
        store.forget(EVALUATION_STEP)
    finally:
        store.close()
