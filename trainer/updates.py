"""The two visits of a step's samples to a rank: they are scored with the weights as they are, then trained on."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from polyturn.configs.schema.run import RunConfig
from polyturn.configs.schema.trainer import BalanceConfig
from polyturn.trainer.algorithms.objective import Objective
from polyturn.trainer.algorithms.reductions import GlobalCounts
from polyturn.trainer.batch import TrainSample, split_over_ranks
from polyturn.trainer.critic_updates import SKIPPED, UNMOVED, in_warmup, score_values, train_critic
from polyturn.trainer.prefix_packs import Split

if TYPE_CHECKING:
    from polyturn.trainer.megatron.critic import MegatronCritic
    from polyturn.trainer.megatron.policy import MegatronPolicy


@dataclass(frozen=True, kw_only=True, slots=True)
class UpdateShare:
    """One data-parallel rank's samples of one optimizer update, with the denominators of the whole update."""

    samples: tuple[TrainSample, ...]
    counts: GlobalCounts

    @property
    def is_empty(self) -> bool:
        """Whether no rank has a token to train on."""
        return self.counts.num_tokens == 0


@dataclass(frozen=True, kw_only=True, slots=True)
class UpdateReport:
    """What one data-parallel rank did in a step."""

    metrics: tuple[Mapping[str, float], ...]
    """Per update, reduced over all ranks."""
    trained_tokens: Mapping[str, int]
    """Trainable tokens of each sample that went into an update of this rank."""
    seconds: float
    shared_prefix: Mapping[str, float] = field(default_factory=dict)
    """The shares of this rank's work that shared prefixes saved; empty where they are not computed once."""

    @property
    def initial_kl(self) -> float:
        """The policy's KL of the first update that was taken: no weight had changed before it. 0 where none was."""
        return next((update["policy_kl"] for update in self.metrics if update != SKIPPED), 0.0)

    @property
    def num_empty(self) -> int:
        """Updates that nobody took, because there was nothing to train on."""
        return sum(update == SKIPPED for update in self.metrics)


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoredColumns:
    """What a rank computed of one sample, float32 [T] each; 0 where the token was not sampled."""

    proximal_logprobs: npt.NDArray[np.float32]
    reference_logprobs: npt.NDArray[np.float32] | None = None
    values: npt.NDArray[np.float32] | None = None


def count_samples(samples: Sequence[TrainSample]) -> GlobalCounts:
    """The denominators of an update of these samples: an episode counts once, whatever its number of segments."""
    return GlobalCounts.of(
        [sample.num_trainable for sample in samples],
        sequence_ids=[sample.sequence_id for sample in samples],
        prompt_ids=[sample.group_id for sample in samples],
    )


def split_updates(
    samples: Sequence[TrainSample],
    *,
    num_updates: int,
    num_ranks: int,
    balance: BalanceConfig | None = None,
    split: Split = split_over_ranks,
) -> list[tuple[UpdateShare, ...]]:
    """Cut a step into updates, and each update over the data-parallel ranks, balanced by cost.

    An update has whole sequences: all segments of an episode are in one. Denominators are taken here, from the whole
    update, before anything is split. Returns one tuple of `num_updates` shares per rank. With few samples some ranks
    have none of an update, or all ranks have none: that update is skipped.
    """
    by_sequence: dict[str, list[TrainSample]] = {}
    for sample in samples:
        by_sequence.setdefault(sample.sequence_id, []).append(sample)
    sequences = list(by_sequence.values())
    bounds = [len(sequences) * index // num_updates for index in range(num_updates + 1)]
    shares: list[list[UpdateShare]] = [[] for _ in range(num_ranks)]
    for low, high in itertools.pairwise(bounds):
        update = [sample for sequence in sequences[low:high] for sample in sequence]
        counts = count_samples(update)
        for rank, part in enumerate(split(update, num_ranks, balance)):
            shares[rank].append(UpdateShare(samples=tuple(part), counts=counts))
    return [tuple(share) for share in shares]


def score_samples(
    policy: MegatronPolicy,
    samples: Sequence[TrainSample],
    *,
    config: RunConfig,
    critic: MegatronCritic | None = None,
) -> dict[str, ScoredColumns]:
    """What the step needs to know of the samples, by sample id.

    The logprobs of the policy as it is, unless the sampler's stand in for them; those of the reference if there is a
    KL; values if there is a critic here.
    """
    temperature = config.rollout.sampling.temperature
    if config.trainer.algorithm.proximal == "scored":
        proximal = policy.logprobs(samples, temperature=temperature)
    else:
        proximal = [sample.behavior_logprobs for sample in samples]
    reference: Sequence[npt.NDArray[np.float32] | None] = [None] * len(samples)
    if config.trainer.algorithm.needs_reference:
        reference = policy.reference_logprobs(samples, temperature=temperature)
    values = {} if critic is None else score_values(critic, samples)
    return {
        sample.sample_id: ScoredColumns(
            proximal_logprobs=ours, reference_logprobs=theirs, values=values.get(sample.sample_id)
        )
        for sample, ours, theirs in zip(samples, proximal, reference, strict=True)
    }


def with_scores(
    samples: Iterable[TrainSample], scores: Iterable[Mapping[str, ScoredColumns]]
) -> dict[str, TrainSample]:
    """The samples with the columns that the ranks computed, by sample id."""
    columns = {sample_id: found for part in scores for sample_id, found in part.items()}
    return {
        sample.sample_id: replace(
            sample,
            proximal_logprobs=columns[sample.sample_id].proximal_logprobs,
            reference_logprobs=columns[sample.sample_id].reference_logprobs,
            values=columns[sample.sample_id].values,
        )
        for sample in samples
    }


def run_updates(
    policy: MegatronPolicy,
    shares: Sequence[UpdateShare],
    *,
    config: RunConfig,
    critic: MegatronCritic | None = None,
) -> UpdateReport:
    """Update once per share: the critic, if there is one here, and the policy, unless the critic is warming up.

    An update that no rank has a token for is skipped and counted: a step of the optimizer without a gradient would
    still move the weights, by momentum and decay. The schedule goes on, so that updates and policy versions stay level.
    """
    started = time.perf_counter()
    objective = Objective.from_config(
        config.trainer.algorithm, temperature=config.rollout.sampling.temperature
    )
    metrics = []
    trained: dict[str, int] = {}
    critic_alone = critic is not None and in_warmup(config, num_critic_updates=critic.num_updates)
    for share in shares:
        if share.is_empty:
            metrics.append(SKIPPED)
            policy.num_updates += not critic_alone
            continue
        found = {} if critic is None else train_critic(critic, share)
        if critic_alone:
            metrics.append({**UNMOVED, **found})
        else:
            update = policy.train(share.samples, objective=objective, global_counts=share.counts)
            metrics.append({**update, **found})
        for sample in share.samples:
            trained[sample.sample_id] = trained.get(sample.sample_id, 0) + sample.num_trainable
    _refresh_reference(policy, config)
    return UpdateReport(
        metrics=tuple(metrics),
        trained_tokens=trained,
        seconds=time.perf_counter() - started,
        shared_prefix=_saved(policy) if config.trainer.shared_prefix == "tree" else {},
    )


def _saved(policy: MegatronPolicy) -> dict[str, float]:
    sharing, flops = policy.take_sharing()
    return {
        "tokens": sharing.saved_fraction(token=1.0),
        "attention": sharing.saved_fraction(pair=1.0),
        "flops": sharing.saved_fraction(token=flops.token, pair=flops.pair),
    }


def critic_report(shares: Sequence[UpdateShare]) -> UpdateReport:
    """The report of a rank of the policy that was left out of a step, because the critic warms up."""
    trained = {sample.sample_id: sample.num_trainable for share in shares for sample in share.samples}
    metrics = tuple(SKIPPED if share.is_empty else UNMOVED for share in shares)
    return UpdateReport(metrics=metrics, trained_tokens=trained, seconds=0.0)


def _refresh_reference(policy: MegatronPolicy, config: RunConfig) -> None:
    every = config.trainer.refresh_reference_every_steps * config.trainer.updates_per_step
    if (
        policy.num_updates
        and every
        and config.trainer.algorithm.needs_reference
        and policy.num_updates % every == 0
    ):
        policy.refresh_reference()


def largest_logprob_difference(samples: Iterable[TrainSample]) -> tuple[float, str]:
    """The largest |proximal - behavior| logprob of a sampled token, and the sample where it is."""
    difference, where = 0.0, ""
    for sample in samples:
        assert sample.proximal_logprobs is not None
        gap = np.abs(sample.proximal_logprobs - sample.behavior_logprobs)[sample.sampled]
        # `not <=` so that a NaN is found.
        if gap.size and not gap.max() <= difference:
            difference, where = float(gap.max()), sample.sample_id
    return difference, where
