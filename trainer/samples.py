"""From groups of episodes to what the trainer scores and trains on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from polyturn.agents.episode import Episode
from polyturn.trainer.batch import TrainSample


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """What shares one reward: an episode, or all that one role wrote in it."""

    part_id: str
    """`Episode.part_id`, and the `sequence_id` of its samples."""
    group_id: str
    reward: float
    episode: Episode
    samples: tuple[TrainSample, ...]
    """One for each segment that the policy wrote in."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepSamples:
    """All that a step played, in the order of its episodes."""

    parts: tuple[Part, ...]

    @property
    def samples(self) -> tuple[TrainSample, ...]:
        return tuple(sample for part in self.parts for sample in part.samples)


def make_samples(episodes: Sequence[Episode]) -> StepSamples:
    """One sample per segment that the policy wrote in.

    Every episode must have a reward: failed ones never reach the trainer. With several agents, roles are compared with
    their like: `solver/0` and `solver/1` of all episodes of a task are one group, its critics another.
    """
    assert all(episode.reward is not None for episode in episodes), "a failed episode is never trained on"
    return StepSamples(parts=tuple(part for episode in episodes for part in _parts(episode)))


def _parts(episode: Episode) -> list[Part]:
    """The episode as a whole, or by role."""
    parts = []
    for role in dict.fromkeys(segment.role for segment in episode.segments) or [""]:
        reward, kind = episode.reward_of(role), role.partition("/")[0]
        assert reward is not None, "an episode with a reward has one for every role"
        part_id = episode.part_id(role)
        group_id = f"{episode.group_id}/{kind}" if kind else episode.group_id
        samples = tuple(
            TrainSample.from_segment(
                segment,
                sample_id=f"{episode.episode_id}/{index}",
                group_id=group_id,
                sequence_id=part_id,
            )
            for index, segment in enumerate(episode.segments)
            if segment.role == role and segment.num_sampled > 0
        )
        parts.append(
            Part(part_id=part_id, group_id=group_id, reward=reward, episode=episode, samples=samples)
        )
    return parts
