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
from polyturn.trainer.credit.off_policy import correct, drop_unusable
from polyturn.trainer.data.samples import TrainSample


@dataclass(frozen=True, kw_only=True, slots=True)
class StepCredit:
    """The samples to train on, with what each token is worth, and figures of the step."""

    samples: tuple[TrainSample, ...]
    advantages: dict[str, float]
    """By `Episode.part_id`: the mean over the part's tokens."""
    metrics: Mapping[str, float] = field(default_factory=dict)


def make_samples(episodes: Sequence[Episode]) -> tuple[TrainSample, ...]:
    """One sample per segment that the policy wrote in, role by role.

    Every episode must have a reward: failed ones never reach the trainer. With several agents, roles are compared with
    their like: `solver/0` and `solver/1` of all episodes of a task are one group, its critics another.
    """
    assert all(episode.reward is not None for episode in episodes), "a failed episode is never trained on"
    return tuple(
        TrainSample.from_segment(
            segment,
            sample_id=f"{episode.episode_id}/{index}",
            group_id=_group_id(episode, role),
            sequence_id=episode.part_id(role),
        )
        for episode in episodes
        for role in _roles(episode)
        for index, segment in enumerate(episode.segments)
        if segment.role == role and segment.num_sampled > 0
    )


def assign_credit(
    episodes: Sequence[Episode],
    scored: Mapping[str, TrainSample],
    algorithm: AlgorithmConfig,
    *,
    version: int,
) -> StepCredit:
    """What each token of a step is worth, and what separates the sampler from the trainer, corrected and measured.

    Args:
        scored: the step's samples with the columns that the algorithm asks for, by sample id.
        version: of the policy that the step begins with.

    Raises:
        ValueError: a reward that is not finite, or a plug-in that does not keep to its protocol.
        ArithmeticError: rewards that cannot be compared, such as those whose squares no float holds.
    """
    usable, dropped = drop_unusable(scored)
    credit = estimate_advantages(episodes, usable, algorithm)
    samples, figures = correct(credit.samples, algorithm, version=version)
    return replace(credit, samples=samples, metrics={**credit.metrics, **dropped, **figures})


def estimate_advantages(
    episodes: Sequence[Episode], scored: Mapping[str, TrainSample], algorithm: AlgorithmConfig
) -> StepCredit:
    """Say what each token of the step is worth, and leave out what is not to be trained on.

    Episodes that a limit ended are dropped before anything is compared, or masked after, if the config says so.

    Raises:
        ValueError: a reward that is not finite, or a plug-in that does not keep to its protocol.
    """
    by_part: dict[str, list[TrainSample]] = {}
    for sample in scored.values():
        by_part.setdefault(sample.sequence_id, []).append(sample)
    every = reward_parts(episodes, by_part, algorithm)
    parts = [part for part in every if algorithm.truncated != "drop" or not part.truncated]
    batch = RewardBatch(parts=tuple(parts))
    if not isinstance(algorithm.reward_shaping, NoShaping):
        batch = postprocess(batch, bind(REWARD_POSTPROCESSORS, algorithm.reward_shaping))
    found = bind(ADVANTAGES, algorithm.advantage)(batch)
    _check(found, batch)
    masked = [algorithm.truncated == "mask" and part.truncated for part in parts]
    samples = tuple(
        _with_estimates(sample, found, index, number)
        for index, part in enumerate(parts)
        if found.trainable[index] and not masked[index]
        for number, sample in enumerate(by_part.get(part.part_id, ()))
    )
    metrics = {
        **found.metrics,
        "truncated/num_dropped": float(len(every) - len(parts)),
        "truncated/num_masked": float(sum(masked)),
        "shaping/reward_mean": _mean([part.reward for part in batch.parts]),
    }
    if isinstance(algorithm.kl, KLInReward):
        penalties = [c.penalties for part in batch.parts for c in part.samples if c.penalties is not None]
        total = sum(float(column.sum()) for column in penalties)
        metrics["kl/reward_penalty"] = total / max(len(batch.parts), 1)
    means = dict(zip((part.part_id for part in parts), found.mean(batch), strict=True))
    return StepCredit(samples=samples, advantages=means, metrics=metrics)


def reward_parts(
    episodes: Sequence[Episode], by_part: Mapping[str, Sequence[TrainSample]], algorithm: AlgorithmConfig
) -> list[RewardPart]:
    """What shares one reward, an episode or all that one role wrote in it, as advantage estimators see it.

    Who wrote nothing, because a limit came or the episode ended before, is left out: its reward is nobody's to compare.

    Args:
        by_part: the scored samples by `Episode.part_id`.
    """
    parts = []
    for episode in episodes:
        truncated = episode.outcome is Outcome.TRUNCATED
        for role in _roles(episode):
            part_id, reward = episode.part_id(role), episode.reward_of(role)
            assert reward is not None, "an episode with a reward has one for every role"
            turn_rewards = _turn_rewards(episode, role, reward)
            samples = by_part.get(part_id, ())
            if not samples and (truncated or episode.segments):
                continue
            parts.append(
                RewardPart(
                    part_id=part_id,
                    group_id=_group_id(episode, role),
                    reward=reward,
                    reward_parts=episode.reward_parts,
                    turn_rewards=turn_rewards,
                    anchors=tuple(turn.anchor for turn in episode.turn_records if turn.role == role),
                    truncated=truncated,
                    samples=tuple(
                        TokenColumns(
                            sampled=sample.sampled,
                            turns=sample.turns,
                            values=sample.values,
                            penalties=_penalties(sample, algorithm),
                        )
                        for sample in samples
                    ),
                )
            )
    return parts


def _roles(episode: Episode) -> list[str]:
    return list(dict.fromkeys(segment.role for segment in episode.segments)) or [""]


def _group_id(episode: Episode, role: str) -> str:
    kind = role.partition("/")[0]
    return f"{episode.group_id}/{kind}" if kind else episode.group_id


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
