"""A step's samples against what separates the sampler from the trainer: corrections, and figures of how far they are.

All of this is done once a step, in the driver, where the whole step is in one place.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from polyturn.configs.schema.algorithm import AlgorithmConfig
from polyturn.trainer.algorithms.diagnostics import mismatch, mismatch_by
from polyturn.trainer.algorithms.registry import CORRECTIONS, ENTROPY_CONTROLS, POLICY_LOSSES, bind
from polyturn.trainer.algorithms.tokens import TokenBatch
from polyturn.trainer.data.samples import TrainSample


def drop_unusable(samples: Mapping[str, TrainSample]) -> tuple[dict[str, TrainSample], dict[str, float]]:
    """Leave out sampled tokens whose behavior logprob is not finite, by sample id, and count them.

    Nothing is known of how likely such a token was, so no ratio of it means anything. It is not trained on and is in no
    denominator; it stays in the context of the tokens after it.
    """
    usable: dict[str, TrainSample] = {}
    num_dropped = 0
    for sample_id, sample in samples.items():
        bad = sample.sampled & ~np.isfinite(sample.behavior_logprobs)
        num_dropped += int(bad.sum())
        usable[sample_id] = replace(sample, sampled=sample.sampled & ~bad) if bad.any() else sample
    return usable, {"offpolicy/unusable_tokens": float(num_dropped)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Corrected:
    """Samples with what their corrections say of their N trainable tokens."""

    samples: tuple[TrainSample, ...]
    """With `correction_weights` and `kl_weights`, if there are corrections or an entropy control."""
    rejected: npt.NDArray[np.bool_]
    """[N]: tokens whose weight by the corrections is 0."""
    clipped: npt.NDArray[np.bool_]
    """[N]: tokens whose weight a correction bounded."""
    clipped_by_loss: npt.NDArray[np.bool_]
    """[N]: tokens that the policy loss bounds before the first update."""
    metrics: Mapping[str, float]

    def bounded(self) -> dict[str, npt.NDArray[np.bool_]]:
        """By sample id, [T]: tokens that a correction or the loss bounds."""
        flags, found, start = self.clipped | self.clipped_by_loss, {}, 0
        for sample in self.samples:
            column = np.zeros(len(sample), dtype=np.bool_)
            column[sample.sampled] = flags[start : start + sample.num_trainable]
            found[sample.sample_id], start = column, start + sample.num_trainable
        return found


def correct(samples: Sequence[TrainSample], config: AlgorithmConfig) -> Corrected:
    """Give samples that are scored and have advantages the product of the config's corrections as weights, and what the
    entropy control makes of each token.

    The metrics are `entropy_control/NAME`, `correction/KIND/NAME` of each correction, and `correction/tokens`,
    `correction/tokens_kept`, `correction/sequences`, `correction/sequences_kept`. The loss is over the tokens and
    sequences before rejection.

    Raises:
        ValueError: a weight that is not finite or is negative.
    """
    behavior = _flat(samples, [sample.behavior_logprobs for sample in samples])
    proximal = _flat(samples, [_proximal(sample) for sample in samples])
    weights, clipped = np.ones(len(behavior)), np.zeros(len(behavior), dtype=np.bool_)
    metrics: dict[str, float] = {}
    if config.corrections and len(behavior):
        weights, clipped, metrics = _weigh(samples, config, behavior, proximal)
        samples = _with_column(samples, weights, "correction_weights")
    if config.entropy_control.kind != "none" and len(behavior):
        samples, figures = _control_entropy(samples, config, proximal, weights)
        metrics = {**metrics, **figures}
    return Corrected(
        samples=tuple(samples),
        rejected=weights == 0,
        clipped=clipped,
        clipped_by_loss=_clipped_by_loss(samples, config) if len(behavior) else clipped,
        metrics=metrics,
    )


def measure(parts: Sequence[Corrected], *, version: int) -> dict[str, float]:
    """How off-policy a step is: `offpolicy/NAME` of `diagnostics.mismatch`, over all trainable tokens of all parts, by
    age (`offpolicy/age_0/NAME`) and by turn (`offpolicy/turn_0/NAME`).

    Args:
        version: of the policy that the step begins with: a token of that version has age 0.
    """
    samples = [sample for part in parts for sample in part.samples]
    behavior = _flat(samples, [sample.behavior_logprobs for sample in samples])
    proximal = _flat(samples, [_proximal(sample) for sample in samples])
    metrics = {f"offpolicy/{name}": value for name, value in mismatch(behavior, proximal).items()}
    if not len(behavior):
        return metrics
    ages = version - _integers(samples, [sample.policy_versions for sample in samples])
    turns = _integers(samples, [sample.turns for sample in samples])
    flags = {
        "clipped_fraction": np.concatenate([part.clipped for part in parts]),
        "rejected_fraction": np.concatenate([part.rejected for part in parts]),
        "loss_clipped_fraction": np.concatenate([part.clipped_by_loss for part in parts]),
    }
    for what, groups in (("age", np.maximum(ages, 0)), ("turn", turns)):
        for group, figures in mismatch_by(groups, behavior, proximal, flags).items():
            metrics.update({f"offpolicy/{what}_{group}/{name}": value for name, value in figures.items()})
    return metrics


def _weigh(
    samples: Sequence[TrainSample],
    config: AlgorithmConfig,
    behavior: npt.NDArray[np.float64],
    proximal: npt.NDArray[np.float64],
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_], dict[str, float]]:
    """At each trainable token, [N], the product of all corrections and whether one bounded it; and their figures."""
    numbers = {name: i for i, name in enumerate(dict.fromkeys(sample.sequence_id for sample in samples))}
    index = np.repeat(
        [numbers[sample.sequence_id] for sample in samples], [sample.num_trainable for sample in samples]
    ).astype(np.int64)
    advantages = _flat(samples, [_advantages(sample) for sample in samples])
    weights, clipped = np.ones(len(behavior)), np.zeros(len(behavior), dtype=np.bool_)
    metrics: dict[str, float] = {}
    for section in config.corrections:
        found = bind(CORRECTIONS, section)(
            torch.from_numpy(behavior),
            torch.from_numpy(proximal),
            torch.ones(len(behavior), dtype=torch.bool),
            torch.from_numpy(index),
            torch.from_numpy(advantages),
        )
        factors = found.weights.detach().double().numpy()
        if factors.shape != weights.shape or not (np.isfinite(factors) & (factors >= 0)).all():
            raise ValueError(
                f"the correction {section.kind!r} must give one finite weight of at least 0 for each of "
                f"{len(weights)} tokens"
            )
        weights = weights * factors
        if found.clipped is not None:
            clipped |= found.clipped.numpy()
        metrics.update({f"correction/{section.kind}/{name}": value for name, value in found.metrics.items()})
    metrics.update(
        {
            "correction/tokens": float(len(weights)),
            "correction/tokens_kept": float((weights > 0).sum()),
            "correction/sequences": float(len(np.unique(index))),
            "correction/sequences_kept": float(len(np.unique(index[weights > 0]))),
        }
    )
    return weights, clipped, metrics


def _control_entropy(
    samples: Sequence[TrainSample],
    config: AlgorithmConfig,
    proximal: npt.NDArray[np.float64],
    weights: npt.NDArray[np.float64],
) -> tuple[tuple[TrainSample, ...], dict[str, float]]:
    """The samples with what the entropy control says of each token, beside the corrections' weights [N]."""
    found = bind(ENTROPY_CONTROLS, config.entropy_control)(
        torch.from_numpy(proximal),
        torch.from_numpy(_flat(samples, [_advantages(sample) for sample in samples])),
        torch.ones(len(proximal), dtype=torch.bool),
    )
    factors, holds = (part.detach().double().numpy() for part in (found.weights, found.kl_weights))
    for numbers in (factors, holds):
        if numbers.shape != weights.shape or not (np.isfinite(numbers) & (numbers >= 0)).all():
            raise ValueError(
                f"the entropy control {config.entropy_control.kind!r} must give finite weights of at least 0 for each "
                f"of {len(weights)} tokens"
            )
    if (factors != 1).any():
        samples = _with_column(samples, weights * factors, "correction_weights")
    if holds.any():
        samples = _with_column(samples, holds, "kl_weights")
    return tuple(samples), {f"entropy_control/{name}": value for name, value in found.metrics.items()}


def _clipped_by_loss(samples: Sequence[TrainSample], config: AlgorithmConfig) -> npt.NDArray[np.bool_]:
    """Which trainable tokens, [N], the policy loss bounds before the first update, where policy and proximal are one.

    None where its ratio is against the proximal policy; elsewhere those that come too late to be learnt from.
    """
    counts = [sample.num_trainable for sample in samples]
    lengths = torch.from_numpy(np.repeat(np.array(counts, dtype=np.int64), counts))
    proximal = torch.from_numpy(_flat(samples, [_proximal(sample) for sample in samples]))
    batch = TokenBatch(
        logprobs=proximal,
        entropies=torch.zeros_like(proximal),
        mask=torch.ones_like(proximal, dtype=torch.bool),
        sequence_index=torch.from_numpy(np.repeat(np.arange(len(samples)), counts)),
        num_sequences=len(samples),
        sequence_lengths=lengths,
        prompt_lengths=lengths,
        turns=torch.from_numpy(_integers(samples, [sample.turns for sample in samples])),
        policy_versions=torch.from_numpy(_integers(samples, [sample.policy_versions for sample in samples])),
        advantages=torch.from_numpy(_flat(samples, [_advantages(sample) for sample in samples])),
        behavior_logprobs=torch.from_numpy(_flat(samples, [sample.behavior_logprobs for sample in samples])),
        proximal_logprobs=proximal,
        reference_logprobs=_if_all(samples, [sample.reference_logprobs for sample in samples]),
        correction_weights=_if_all(samples, [sample.correction_weights for sample in samples]),
    )
    clipped: npt.NDArray[np.bool_] = bind(POLICY_LOSSES, config.loss)(batch).clipped.numpy()
    return clipped


def _with_column(
    samples: Sequence[TrainSample],
    values: npt.NDArray[np.float64],
    name: Literal["correction_weights", "kl_weights"],
) -> tuple[TrainSample, ...]:
    """The samples with the values [N] of all their trainable tokens as that column."""
    result = []
    ends = np.cumsum([sample.num_trainable for sample in samples])
    for sample, end in zip(samples, ends, strict=True):
        column = np.zeros(len(sample), dtype=np.float32)
        column[sample.sampled] = values[end - sample.num_trainable : end]
        result.append(
            replace(sample, correction_weights=column)
            if name == "correction_weights"
            else replace(sample, kl_weights=column)
        )
    return tuple(result)


def _flat(
    samples: Sequence[TrainSample], columns: Sequence[npt.NDArray[np.float32]]
) -> npt.NDArray[np.float64]:
    """A column of each sample at its trainable tokens, all in a row, [N]."""
    parts = [column[sample.sampled] for sample, column in zip(samples, columns, strict=True)]
    return np.concatenate([np.zeros(0), *parts]).astype(np.float64)


def _if_all(
    samples: Sequence[TrainSample], columns: Sequence[npt.NDArray[np.float32] | None]
) -> torch.Tensor | None:
    """The same as a tensor; None where a sample does not have the column."""
    found = [column for column in columns if column is not None]
    return torch.from_numpy(_flat(samples, found)) if len(found) == len(columns) else None


def _integers(
    samples: Sequence[TrainSample], columns: Sequence[npt.NDArray[np.signedinteger[Any]]]
) -> npt.NDArray[np.int64]:
    parts = [column[sample.sampled] for sample, column in zip(samples, columns, strict=True)]
    return np.concatenate([np.zeros(0, dtype=np.int64), *parts]).astype(np.int64)


def _proximal(sample: TrainSample) -> npt.NDArray[np.float32]:
    assert sample.proximal_logprobs is not None, f"{sample.sample_id} has not been scored"
    return sample.proximal_logprobs


def _advantages(sample: TrainSample) -> npt.NDArray[np.float32]:
    assert sample.advantages is not None, f"{sample.sample_id} has no advantages yet"
    return sample.advantages


def largest_logprob_difference(samples: Iterable[TrainSample], *, version: int) -> tuple[float, str]:
    """The largest |proximal - behavior| logprob of a token that the policy of that version sampled, and its sample.

    Tokens of older versions differ by what has been learnt since.
    """
    difference, where = 0.0, ""
    for sample in samples:
        assert sample.proximal_logprobs is not None
        fresh = sample.sampled & (sample.policy_versions >= version)
        gap = np.abs(sample.proximal_logprobs - sample.behavior_logprobs)[fresh]
        # `not <=` so that a NaN is found.
        if gap.size and not gap.max() <= difference:
            difference, where = float(gap.max()), sample.sample_id
    return difference, where
