"""From the episodes of a step, their rewards and the scored samples to what each token is worth.

This is where the whole step is in one place, before it is cut into updates, ranks and micro-batches: means, deviations
and counts taken here are global.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from polyturn.agents.episode import Episode, Outcome
from polyturn.configs.schema.algorithm import AlgorithmConfig, NoShaping
from polyturn.configs.schema.objective import KLInReward
from polyturn.trainer.algorithms.advantages import Advantages, Float32, RewardBatch, RewardPart, TokenColumns
from polyturn.trainer.algorithms.kl import k1
from polyturn.trainer.algorithms.registry import ADVANTAGES, REWARD_POSTPROCESSORS, bind
from polyturn.trainer.algorithms.shaping import postprocess
from polyturn.trainer.data.samples import TrainSample


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


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimates:
    """The samples to train on, with their advantages, and figures of the step."""

    samples: tuple[TrainSample, ...]
    advantages: dict[str, float]
    """By `Part.part_id`: the mean over the part's tokens."""
    metrics: Mapping[str, float] = field(default_factory=dict)


def estimate_advantages(
    step: StepSamples, scored: Mapping[str, TrainSample], algorithm: AlgorithmConfig
) -> Estimates:
    """Say what each token of the step is worth, and leave out what is not to be trained on.

    Episodes that a limit ended are dropped before anything is compared, or masked after, if the config says so.

    Args:
        scored: the step's samples with the columns that the algorithm asks for, by sample id.

    Raises:
        ValueError: a reward that is not finite, or a plug-in that does not keep to its protocol.
    """
    parts = [part for part in step.parts if algorithm.truncated != "drop" or not part.truncated]
    batch = RewardBatch(parts=tuple(reward_part(part, scored, algorithm) for part in parts))
    if not isinstance(algorithm.reward_shaping, NoShaping):
        batch = postprocess(batch, bind(REWARD_POSTPROCESSORS, algorithm.reward_shaping))
    found = bind(ADVANTAGES, algorithm.advantage)(batch)
    _check(found, batch)
    masked = [algorithm.truncated == "mask" and part.truncated for part in parts]
    samples = tuple(
        _with_estimates(scored[sample.sample_id], found, index, number)
        for index, part in enumerate(parts)
        if found.trainable[index] and not masked[index]
        for number, sample in enumerate(part.samples)
    )
    means = found.mean(batch)
    metrics = {
        **found.metrics,
        "truncated/num_dropped": float(len(step.parts) - len(parts)),
        "truncated/num_masked": float(sum(masked)),
        "shaping/reward_mean": _mean([part.reward for part in batch.parts]),
    }
    if isinstance(algorithm.kl, KLInReward):
        penalties = [c.penalties for part in batch.parts for c in part.samples if c.penalties is not None]
        total = sum(float(column.sum()) for column in penalties)
        metrics["kl/reward_penalty"] = total / max(len(batch.parts), 1)
    return Estimates(
        samples=samples,
        advantages={part.part_id: mean for part, mean in zip(parts, means, strict=True)},
        metrics=metrics,
    )


def reward_part(part: Part, scored: Mapping[str, TrainSample], algorithm: AlgorithmConfig) -> RewardPart:
    """A part as advantage estimators see it."""
    samples = [scored[sample.sample_id] for sample in part.samples]
    return RewardPart(
        part_id=part.part_id,
        group_id=part.group_id,
        reward=part.reward,
        reward_parts=part.episode.reward_parts,
        turn_rewards=part.turn_rewards,
        anchors=part.anchors,
        truncated=part.truncated,
        samples=tuple(
            TokenColumns(
                sampled=sample.sampled,
                turns=sample.turns.astype("int32"),
                values=sample.values,
                penalties=_penalties(sample, algorithm),
            )
            for sample in samples
        ),
    )


def _penalties(sample: TrainSample, algorithm: AlgorithmConfig) -> Float32 | None:
    """What the KL takes off the reward, token by token, by the policy at the start of the step; None without it."""
    if not isinstance(algorithm.kl, KLInReward):
        return None
    assert sample.proximal_logprobs is not None and sample.reference_logprobs is not None
    assert algorithm.kl.estimator == "k1", "the only one whose place is in the reward"
    values = k1(
        torch.from_numpy(sample.proximal_logprobs),
        torch.from_numpy(sample.reference_logprobs),
        torch.from_numpy(sample.sampled),
    )
    penalties: Float32 = (algorithm.kl.coefficient * values).numpy()
    return penalties


def _check(found: Advantages, batch: RewardBatch) -> None:
    """Raise `ValueError` unless an estimator, which may be a user's own, gave one finite number for each token."""
    shapes = [[column.shape for column in columns] for columns in found.columns]
    expected = [[sample.sampled.shape for sample in part.samples] for part in batch.parts]
    if shapes != expected or len(found.trainable) != len(batch.parts):
        raise ValueError(f"the advantages have the shapes {shapes}, but the step's samples {expected}")
    for part, columns in zip(batch.parts, found.columns, strict=True):
        for sample, column in zip(part.samples, columns, strict=True):
            if not (abs(column[sample.sampled]) < float("inf")).all():
                raise ValueError(f"an advantage of {part.part_id!r} is not finite")


def _with_estimates(sample: TrainSample, found: Advantages, index: int, number: int) -> TrainSample:
    returns = None if found.returns is None else found.returns[index][number]
    return replace(sample, advantages=found.columns[index][number], returns=returns)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0
