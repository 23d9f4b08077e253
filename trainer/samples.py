"""From groups of episodes to what the trainer trains on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from polyturn.agents.episode import Episode
from polyturn.agents.ledger import Segment
from polyturn.configs.schema import Advantage, AlgorithmConfig, GroupAdvantage
from polyturn.trainer.algorithms.advantages import GroupAdvantages, group_advantages
from polyturn.trainer.batch import TrainSample


@dataclass(frozen=True, kw_only=True, slots=True)
class StepSamples:
    """The samples of a step, and what became of its groups."""

    samples: tuple[TrainSample, ...]
    advantages: dict[str, float]
    """By `Episode.part_id`: of an episode, or of one role in it."""
    groups: GroupAdvantages


@dataclass(frozen=True, kw_only=True, slots=True)
class _Part:
    """What shares one reward: an episode, or all that one role wrote in it."""

    part_id: str
    group_id: str
    reward: float
    samples: tuple[tuple[str, Segment], ...]
    """Segments by sample id."""


def make_samples(episodes: Sequence[Episode], algorithm: AlgorithmConfig) -> StepSamples:
    """One sample per segment that the policy wrote in. An episode counts once in its group, whatever its segments.

    Every episode must have a reward: failed ones never reach the trainer. An episode alone in its group has nothing
    to be compared with and is left out. With several agents, roles are compared with their like: `solver/0` and
    `solver/1` of all episodes of a task are one group, its critics another.
    """
    assert all(episode.reward is not None for episode in episodes), "a failed episode is never trained on"
    parts = [part for episode in episodes for part in _parts(episode)]
    groups = _advantages([p.reward for p in parts], [p.group_id for p in parts], algorithm.advantage)
    samples = tuple(
        TrainSample.from_segment(segment, sample_id=sample_id, group_id=part.group_id, advantage=advantage)
        for part, advantage, trainable in zip(parts, groups.advantages, groups.trainable, strict=True)
        for sample_id, segment in part.samples
        if trainable and segment.num_sampled > 0
    )
    advantages = {part.part_id: value for part, value in zip(parts, groups.advantages, strict=True)}
    return StepSamples(samples=samples, advantages=advantages, groups=groups)


def _parts(episode: Episode) -> list[_Part]:
    """The episode as a whole, or by role."""
    parts = []
    for role in dict.fromkeys(segment.role for segment in episode.segments) or [""]:
        reward, kind = episode.reward_of(role), role.partition("/")[0]
        assert reward is not None, "an episode with a reward has one for every role"
        samples = tuple(
            (f"{episode.episode_id}/{index}", segment)
            for index, segment in enumerate(episode.segments)
            if segment.role == role
        )
        parts.append(
            _Part(
                part_id=episode.part_id(role),
                group_id=f"{episode.group_id}/{kind}" if kind else episode.group_id,
                reward=reward,
                samples=samples,
            )
        )
    return parts


def _advantages(rewards: Sequence[float], group_ids: Sequence[str], config: Advantage) -> GroupAdvantages:
    if isinstance(config, GroupAdvantage):
        return group_advantages(
            rewards, group_ids, kind="grpo", epsilon=config.epsilon, min_spread=config.min_spread
        )
    return group_advantages(rewards, group_ids, kind="dr_grpo")
