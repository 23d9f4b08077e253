"""From groups of episodes to what the trainer scores and trains on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from polyturn.agents.episode import Episode, Outcome
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
    turn_rewards: tuple[float, ...] = ()
    """By turn of the part; they add up to `reward`. Empty where it is not known by turn."""
    anchors: tuple[str, ...] = ()
    """By turn of the part, a digest of the state in which it was taken."""

    @property
    def is_unwritten(self) -> bool:
        """Whether a limit came, or the episode ended, before the policy wrote anything here."""
        return not self.samples and (self.truncated or bool(self.episode.segments))

    @property
    def truncated(self) -> bool:
        """Whether a limit ended the episode, not the task."""
        return self.episode.outcome is Outcome.TRUNCATED


@dataclass(frozen=True, kw_only=True, slots=True)
class StepSamples:
    """All that a step played, in the order of its episodes."""

    parts: tuple[Part, ...]

    @property
    def samples(self) -> tuple[TrainSample, ...]:
        return tuple(sample for part in self.parts for sample in part.samples)


def make_samples(episodes: Sequence[Episode]) -> StepSamples:
    """One sample per segment that the policy wrote in. Who wrote nothing is no part: its reward is nobody's to compare.

    Every episode must have a reward: failed ones never reach the trainer. With several agents, roles are compared with
    their like: `solver/0` and `solver/1` of all episodes of a task are one group, its critics another.
    """
    assert all(episode.reward is not None for episode in episodes), "a failed episode is never trained on"
    parts = (part for episode in episodes for part in _parts(episode))
    return StepSamples(parts=tuple(part for part in parts if part.samples or not part.is_unwritten))


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
            Part(
                part_id=part_id,
                group_id=group_id,
                reward=reward,
                episode=episode,
                samples=samples,
                turn_rewards=_turn_rewards(episode, role, reward),
                anchors=tuple(turn.anchor for turn in episode.turn_records if turn.role == role),
            )
        )
    return parts


def _turn_rewards(episode: Episode, role: str, reward: float) -> tuple[float, ...]:
    """What each turn of the role brought; whatever else is in its reward came with its last turn.

    A role with a reward of its own got it at the end: what the environment paid turn by turn was not its own.
    """
    turns = [turn.reward for turn in episode.turn_records if turn.role == role]
    if not turns:
        return ()
    if not all(math.isfinite(turn) for turn in turns):
        raise ValueError(f"episode {episode.episode_id!r}: the rewards of its turns are {turns}")
    if role in episode.role_rewards:
        turns = [0.0] * len(turns)
    return (*turns[:-1], reward - sum(turns[:-1]))
