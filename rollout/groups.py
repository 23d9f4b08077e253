"""Prompts in the order in which a run draws them, the groups of episodes that answer them, and the groups' rewards."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace

from polyturn.agents.episode import Episode
from polyturn.envs.messages import AssistantMessage, EpisodeView, Task
from polyturn.envs.rewards.rubric import GroupCriterion, score_group
from polyturn.envs.tasks.curriculum import Curriculum
from polyturn.envs.tasks.order import DrawOrder, ShuffledOrder


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """One draw of a task. Everything in it follows from the cursor's seed and `position`, unless a curriculum draws."""

    task_index: int
    epoch: int
    position: int
    """How many prompts were drawn before this one, over the whole run."""
    group_id: str
    """The identity that the episodes of this prompt share."""


class PromptCursor:
    """Draws prompts without end: every task once per epoch, or the sources of a mixture by their weights.

    A cursor made with the `position` of another goes on exactly where that one stood.
    """

    def __init__(
        self, num_tasks: int, *, seed: int, position: int = 0, order: DrawOrder | None = None
    ) -> None:
        """`order`: as `draw_order` gives it for a source; None shuffles. Raises `ValueError` for an empty source."""
        self._order = order if order is not None else ShuffledOrder(num_tasks, seed=seed)
        self._position = position

    @property
    def position(self) -> int:
        """How many prompts have been drawn."""
        return self._position

    def take(self, num_prompts: int) -> list[Prompt]:
        """Draw the next prompts."""
        prompts = self.peek(num_prompts)
        self._position += num_prompts
        return prompts

    def peek(self, num_prompts: int) -> list[Prompt]:
        """The next prompts, which are drawn later."""
        return self.peek_at(self._position, num_prompts)

    def peek_at(self, position: int, num_prompts: int) -> list[Prompt]:
        """So many prompts from a position on; none where they depend on what comes of those before."""
        if isinstance(self._order, Curriculum):
            return []
        return [self.at(position + offset) for offset in range(num_prompts)]

    def at(self, position: int) -> Prompt:
        """The prompt that is drawn after `position` others."""
        draw = self._order[position]
        return Prompt(
            task_index=draw.task_index, epoch=draw.epoch, position=position, group_id=group_id_at(position)
        )

    def observe(self, prompt: Prompt, episodes: Sequence[Episode]) -> None:
        """What came of a prompt, once: its episodes that did not fail; none where no step gets them."""
        if isinstance(self._order, Curriculum):
            rewards = [without_group_rewards(episode).reward for episode in episodes]
            self._order.observe(prompt.position, [reward for reward in rewards if reward is not None])

    @property
    def curriculum(self) -> Curriculum | None:
        """What draws by results; None where the order is fixed."""
        return self._order if isinstance(self._order, Curriculum) else None


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """The episodes of one prompt, by identity. Episodes that failed for good are counted, not contained."""

    group_id: str
    prompt: Prompt
    episodes: tuple[Episode, ...]
    """In the order of their sample indices."""
    num_expected: int
    num_dropped: int
    """Episodes that still failed after all retries."""
    num_retries: int
    """Failed attempts that were played again."""
    num_user_faults: int = 0
    """Failed attempts, of both kinds, whose simulated user could not be played."""

    @property
    def num_missing(self) -> int:
        """Episodes that were not played because the collection was stopped."""
        return self.num_expected - len(self.episodes) - self.num_dropped


def group_id_at(position: int) -> str:
    """The id of the group of the prompt at a position; `position_of` reads it."""
    return f"g{position:08d}"


def position_of(group_id: str) -> int:
    """The position of a training prompt. Raises `ValueError` for the id of another group."""
    digits = group_id.removeprefix("g")
    if not digits.isdigit():
        raise ValueError(f"{group_id!r} is no group of a training run")
    return int(digits)


def journal_of(position: int, *, prompts_per_step: int) -> int:
    """The number of the journal that a prompt's episodes are kept in: one for each step's worth of prompts, from 1."""
    return position // prompts_per_step + 1


def episode_seed(*, run_seed: int, group_id: str, sample: int, attempt: int) -> int:
    """The seed of one attempt: 48 bits of SHA-256 over its identity, so independent of order and timing."""
    identity = f"{run_seed}/{group_id}/{sample}/{attempt}".encode()
    return int.from_bytes(hashlib.sha256(identity).digest()[:6])


def episode_id(group_id: str, sample: int, attempt: int) -> str:
    """The id of one attempt; `parse_episode_id` reads it."""
    return f"{group_id}.{sample}.{attempt}"


def parse_episode_id(identity: str) -> tuple[str, int, int]:
    """Group id, sample index and attempt of an `episode_id`."""
    group_id, sample, attempt = identity.rsplit(".", 2)
    return group_id, int(sample), int(attempt)


PREFIX = "group."
"""Begins the name of every part that a group reward adds."""


async def add_group_rewards(
    episodes: Sequence[Episode],
    parts: Sequence[GroupCriterion],
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
