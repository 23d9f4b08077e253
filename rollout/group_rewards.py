"""Rewards that see a whole group, added to what its episodes have."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import replace

from polyturn.agents.episode import Episode
from polyturn.envs.messages import AssistantMessage
from polyturn.envs.rewards.group import GroupPart, score_group
from polyturn.envs.rewards.types import EpisodeView
from polyturn.envs.tasks import Task

PREFIX = "group."
"""Begins the name of every part that a group reward adds."""


async def add_group_rewards(
    episodes: Sequence[Episode],
    parts: Sequence[GroupPart],
    *,
    task: Task,
    executor: Executor | None = None,
    timeout_s: float | None = None,
) -> tuple[Episode, ...]:
    """The episodes of one task with the group rewards in `reward` and `reward_parts`, also of each role.

    They are added once, whatever was added before: where all episodes have them, as those of a finished step that are
    read back do, they stay; where one was played again, all are compared anew, by the rewards that the task paid.

    Raises:
        EnvironmentFault: a group reward failed, or took longer than `timeout_s`; none is added.
    """
    if not parts or not episodes:
        return tuple(episodes)
    if all(episode.group_reward is not None for episode in episodes):
        return tuple(episodes)
    episodes = [without_group_rewards(episode) for episode in episodes]
    views = [_view(episode, task) for episode in episodes]
    scores = await score_group(parts, views, executor=executor, timeout_s=timeout_s)
    return tuple(
        replace(
            episode,
            reward=(episode.reward or 0.0) + score.value,
            reward_parts={
                **episode.reward_parts,
                **{PREFIX + name: raw for name, raw in score.parts.items()},
            },
            role_rewards={role: reward + score.value for role, reward in episode.role_rewards.items()},
            group_reward=score.value,
        )
        for episode, score in zip(episodes, scores, strict=True)
    )


def without_group_rewards(episode: Episode) -> Episode:
    """The episode as its task paid it."""
    if episode.group_reward is None or episode.reward is None:
        return episode
    return replace(
        episode,
        reward=episode.reward - episode.group_reward,
        reward_parts={
            name: value for name, value in episode.reward_parts.items() if not name.startswith(PREFIX)
        },
        role_rewards={role: reward - episode.group_reward for role, reward in episode.role_rewards.items()},
        group_reward=None,
    )


def _view(episode: Episode, task: Task) -> EpisodeView:
    answers = [message["content"] for message in episode.messages if message["role"] == "assistant"]
    return EpisodeView(
        task=task,
        message=AssistantMessage(content=answers[-1] if answers else ""),
        messages=episode.messages,
        metrics=dict(episode.metrics),
        reward=episode.reward,
        reward_parts=dict(episode.reward_parts),
    )
