"""From the episodes of a step, their rewards and the scored samples to what each token is worth.

This is where the whole step is in one place, before it is cut into updates, ranks and micro-batches: means, deviations
and counts taken here are global.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import torch

from polyturn.agents.episode import BEST_OF_SAMPLES, Episode, Outcome
from polyturn.agents.ledger import Segment
from polyturn.configs.schema.algorithm import AlgorithmConfig, DistillationInAdvantage, NoShaping
from polyturn.configs.schema.objective import KLInReward
from polyturn.trainer.algorithms.advantages import Advantages, Float32, RewardBatch, RewardPart, TokenColumns
from polyturn.trainer.algorithms.kl import k1
from polyturn.trainer.algorithms.registry import ADVANTAGES, REWARD_POSTPROCESSORS, bind
from polyturn.trainer.algorithms.shaping import postprocess
from polyturn.trainer.credit.distillation import add_distillation, distillation_figures
from polyturn.trainer.credit.off_policy import correct, drop_unusable, measure
from polyturn.trainer.data.samples import TrainSample

COUNTED = ("num_", "tokens", "sequences")
"""How the names of figures begin that several algorithms' are added up of."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepCredit:
    """The samples to train on, with what each token is worth, and figures of the step."""

    samples: tuple[TrainSample, ...]
    advantages: dict[str, float]
    """By `Episode.part_id`: the mean over the part's tokens."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    bounded: Mapping[str, npt.NDArray[np.bool_]] = field(default_factory=dict)
    """By sample id, [T]: tokens that a correction or the policy's loss bounds before the first update."""


def make_samples(
    episodes: Sequence[Episode], *, environments: Collection[str] = ()
) -> tuple[TrainSample, ...]:
    """One sample per segment that the policy wrote in, role by role.

    `environments` are those that have an algorithm of their own, by id.

    Every episode must have a reward: failed ones never reach the trainer. With several agents, roles are compared with
    their like: `solver/0` and `solver/1` of all episodes of a task are one group, its critics another.

    Raises:
        ValueError: an episode was chosen among several: its tokens are no samples of the policy.
    """
    for episode in episodes:
        if BEST_OF_SAMPLES in episode.metrics:
            raise ValueError(
                f"episode {episode.episode_id} is the best of {episode.metrics[BEST_OF_SAMPLES]:g} samples: its tokens "
                "are likelier among the chosen than among the sampled; train without best_of, which is for evaluations"
            )
    assert all(episode.reward is not None for episode in episodes), "a failed episode is never trained on"
    return tuple(
        _sample(segment, index, episode, _algorithm_of(episode, environments))
        for episode in episodes
        for role in _roles(episode)
        for index, segment in enumerate(episode.segments)
        if segment.role == role and segment.num_sampled > 0
    )


def _sample(segment: Segment, index: int, episode: Episode, environment: str) -> TrainSample:
    """The sample of a segment; they share their columns."""
    return TrainSample(
        sample_id=f"{episode.episode_id}/{index}",
        group_id=_group_id(episode, segment.role),
        sequence_id=episode.part_id(segment.role),
        environment=environment,
        token_ids=segment.token_ids,
        sampled=segment.sampled,
        behavior_logprobs=segment.logprobs,
        policy_versions=segment.policy_versions,
        turns=segment.turns,
        routed_experts=segment.routed_experts,
        support=segment.support,
        teacher_logprobs=segment.teacher_logprobs,
    )


def assign_credit(
    episodes: Sequence[Episode],
    scored: Mapping[str, TrainSample],
    algorithm: AlgorithmConfig,
    *,
    version: int,
    own_algorithms: Mapping[str, AlgorithmConfig] | None = None,
) -> StepCredit:
    """What each token of a step is worth, and what separates the sampler from the trainer, corrected and measured.

    Where environments have algorithms of their own, each estimates advantages and corrects over the episodes of its
    environment alone. Counts in the metrics are then of the whole step, and what the algorithms say of their episodes
    stands under `environment/ID/`.

    Args:
        scored: the step's samples with the columns that the algorithm asks for, by sample id.
        version: of the policy that the step begins with.
        own_algorithms: by environment; `algorithm` is that of all others.

    Raises:
        ValueError: a reward that is not finite, or a plug-in that does not keep to its protocol.
        ArithmeticError: rewards that cannot be compared, such as those whose squares no float holds.
    """
    usable, dropped = drop_unusable(scored)
    own_algorithms = own_algorithms or {}
    environments = dict.fromkeys(_algorithm_of(episode, own_algorithms) for episode in episodes) or [""]
    parts = [
        _Part(
            environment=environment,
            algorithm=own_algorithms.get(environment, algorithm),
            credit=estimate_advantages(
                [episode for episode in episodes if _algorithm_of(episode, own_algorithms) == environment],
                {name: sample for name, sample in usable.items() if sample.environment == environment},
                own_algorithms.get(environment, algorithm),
            ),
        )
        for environment in environments
    ]
    corrected = [correct(part.credit.samples, part.algorithm) for part in parts]
    by_id = {sample.sample_id: sample for found in corrected for sample in found.samples}
    # As they were: what is cut into updates by order must not be sorted by environment.
    samples = tuple(by_id[name] for name in usable if name in by_id)
    figures = [{**part.credit.metrics, **found.metrics} for part, found in zip(parts, corrected, strict=True)]
    return StepCredit(
        samples=samples,
        advantages={name: value for part in parts for name, value in part.credit.advantages.items()},
        metrics={
            **_joined({part.environment: row for part, row in zip(parts, figures, strict=True)}),
            **dropped,
            **measure(corrected, version=version),
            **distillation_figures(samples),
        },
        bounded={name: column for found in corrected for name, column in found.bounded().items()},
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Part:
    """What one algorithm made of its environment's episodes."""

    environment: str
    algorithm: AlgorithmConfig
    credit: StepCredit


def _algorithm_of(episode: Episode, own_algorithms: Collection[str]) -> str:
    """The environment whose own algorithm an episode is trained by, or "" for that of all others."""
    return episode.env_id if episode.env_id in own_algorithms else ""


def _joined(rows: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """The figures of the step: those of its one algorithm, or of several each beside the sums of what is counted."""
    if list(rows) == [""]:
        return dict(rows[""])
    joined: dict[str, float] = {}
    for environment, row in rows.items():
        for name, value in row.items():
            joined[f"environment/{environment or 'others'}/{name}"] = value
            if name.rpartition("/")[2].startswith(COUNTED):
                joined[name] = joined.get(name, 0.0) + value
    return joined


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
    if isinstance(algorithm.distillation, DistillationInAdvantage):
        samples_of = [by_part.get(part.part_id, ()) for part in parts]
        found = add_distillation(found, samples_of, algorithm.distillation)
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
                    parent_id=episode.parent_id if episode.is_branch else "",
                    branch_turn=episode.branch_turn,
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
