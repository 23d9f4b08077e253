"""From groups of episodes to what the trainer trains on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from polyturn.agents.episode import Episode
from polyturn.configs.schema import Advantage, AlgorithmConfig, GroupAdvantage
from polyturn.trainer.algorithms.advantages import GroupAdvantages, group_advantages
from polyturn.trainer.batch import TrainSample


@dataclass(frozen=True, kw_only=True, slots=True)
class StepSamples:
    """The samples of a step, and what became of its groups."""

    samples: tuple[TrainSample, ...]
    advantages: dict[str, float]
    """By episode id."""
    groups: GroupAdvantages


def make_samples(episodes: Sequence[Episode], algorithm: AlgorithmConfig) -> StepSamples:
    """One sample per segment that the policy wrote in. An episode counts once in its group, whatever its segments.

    Every episode must have a reward: failed ones never reach the trainer. An episode alone in its group has nothing
    to be compared with and is left out.
    """
    rewards = [episode.reward for episode in episodes if episode.reward is not None]
    assert len(rewards) == len(episodes), "a failed episode is never trained on"
    groups = _advantages(rewards, [episode.group_id for episode in episodes], algorithm.advantage)
    samples = tuple(
        TrainSample.from_segment(
            segment,
            sample_id=f"{episode.episode_id}/{index}",
            group_id=episode.group_id,
            advantage=advantage,
        )
        for episode, advantage, trainable in zip(episodes, groups.advantages, groups.trainable, strict=True)
        for index, segment in enumerate(episode.segments)
        if trainable and segment.num_sampled > 0
    )
    advantages = {
        episode.episode_id: value for episode, value in zip(episodes, groups.advantages, strict=True)
    }
    return StepSamples(samples=samples, advantages=advantages, groups=groups)


def _advantages(rewards: Sequence[float], group_ids: Sequence[str], config: Advantage) -> GroupAdvantages:
    if isinstance(config, GroupAdvantage):
        return group_advantages(
            rewards, group_ids, kind="grpo", epsilon=config.epsilon, min_spread=config.min_spread
        )
    return group_advantages(rewards, group_ids, kind="dr_grpo")
