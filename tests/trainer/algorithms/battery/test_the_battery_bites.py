"""Bugs that were seen in the field, planted one at a time: the battery finds each by the check that is for it."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from polyturn.trainer.algorithms.advantages import (
    Advantages,
    Float32,
    Float64,
    RewardBatch,
    back,
    spread_evenly,
    trajectory,
)
from polyturn.trainer.algorithms.protocols import CorrectionWeights
from polyturn.trainer.algorithms.registry import (
    ADVANTAGES,
    CORRECTIONS,
    KL_ESTIMATORS,
    POLICY_LOSSES,
    REDUCERS,
    REWARD_POSTPROCESSORS,
    Registry,
)
from polyturn.trainer.algorithms.tokens import GlobalCounts, TokenBatch, TokenLoss
from polyturn.trainer.battery import BatteryFailure, run_battery, run_check


def plain(values: torch.Tensor, batch: TokenBatch) -> TokenLoss:
    return TokenLoss(values=values, clipped=torch.zeros_like(batch.mask))


def gaps(batch: TokenBatch) -> torch.Tensor:
    return torch.where(batch.mask, batch.logprobs, 0.0) - torch.where(
        batch.mask, batch.proximal_logprobs, 0.0
    )


def ratio(batch: TokenBatch) -> torch.Tensor:
    anchored = replace(batch, proximal_logprobs=batch.proximal_logprobs.detach())
    return gaps(anchored).clamp(-20, 20).exp()


def advantages(batch: TokenBatch) -> torch.Tensor:
    return torch.where(batch.mask, batch.advantages, 0.0)


def right_loss(batch: TokenBatch) -> TokenLoss:
    return plain(-ratio(batch) * advantages(batch), batch)


def without_mask(batch: TokenBatch) -> TokenLoss:
    return plain(-(batch.logprobs - batch.proximal_logprobs).exp() * batch.advantages, batch)


def masked_by_product(batch: TokenBatch) -> TokenLoss:
    """0 times NaN is NaN."""
    return plain(-(batch.logprobs - batch.proximal_logprobs).exp() * batch.advantages * batch.mask, batch)


def over_the_micro_batch(batch: TokenBatch) -> TokenLoss:
    """A mean over the tokens that happen to be there."""
    return plain(right_loss(batch).values / batch.mask.sum().clamp(min=1), batch)


def sequence_ratio_over_the_pack(batch: TokenBatch) -> TokenLoss:
    gap = torch.where(batch.mask, batch.logprobs - batch.proximal_logprobs, 0.0)
    mean = gap.sum() / batch.mask.sum().clamp(min=1)
    return plain(torch.where(batch.mask, -mean.clamp(-20, 20).exp() * batch.advantages, 0.0), batch)


def sequence_ratio_over_the_width(batch: TokenBatch) -> TokenLoss:
    """The mean of a sequence's log-ratios counts its observations."""
    gap = gaps(batch)
    size = torch.zeros(batch.num_sequences, dtype=gap.dtype)
    size = size.index_add(0, batch.sequence_index, torch.ones_like(gap)).clamp(min=1)
    mean = batch.sequence_sums(gap) / size
    return plain(-mean.clamp(-20, 20).exp()[batch.sequence_index] * advantages(batch), batch)


def scrubbed(batch: TokenBatch) -> TokenLoss:
    """NaN becomes a harmless 0."""
    return plain(right_loss(replace(batch, logprobs=batch.logprobs.nan_to_num())).values.nan_to_num(), batch)


def unclamped(batch: TokenBatch) -> TokenLoss:
    return plain(-gaps(batch).exp() * advantages(batch), batch)


def through_the_anchor(batch: TokenBatch) -> TokenLoss:
    """A gradient goes into what should be a constant."""
    return plain(-gaps(batch).clamp(-20, 20).exp() * advantages(batch), batch)


def wrong_sign(batch: TokenBatch) -> TokenLoss:
    return plain(ratio(batch) * advantages(batch), batch)


def detached(batch: TokenBatch) -> TokenLoss:
    """The right value, without a gradient."""
    return plain(-ratio(batch).detach() * advantages(batch), batch)


def half_precision(batch: TokenBatch) -> TokenLoss:
    return plain((-ratio(batch) * advantages(batch)).bfloat16(), batch)


BROKEN_LOSSES = [
    pytest.param(without_mask, "masked_slots", marks=pytest.mark.catalogue("B15")),
    pytest.param(masked_by_product, "poison", marks=pytest.mark.catalogue("B15")),
    pytest.param(over_the_micro_batch, "split", marks=pytest.mark.catalogue("B14", "B18")),
    pytest.param(sequence_ratio_over_the_pack, "split", marks=pytest.mark.catalogue("B18")),
    pytest.param(sequence_ratio_over_the_width, "deletion", marks=pytest.mark.catalogue("B17")),
    pytest.param(sequence_ratio_over_the_width, "padding", marks=pytest.mark.catalogue("B17", "B28")),
    pytest.param(scrubbed, "nan_shows", marks=pytest.mark.catalogue("B30")),
    pytest.param(unclamped, "overflow"),
    pytest.param(through_the_anchor, "purity"),
    pytest.param(wrong_sign, "gradient_as_loss"),
    pytest.param(detached, "gradient_as_loss"),
    pytest.param(half_precision, "dtype"),
]


@pytest.mark.parametrize(("loss", "check"), BROKEN_LOSSES)
def test_a_broken_policy_loss_is_found(loss: Any, check: str) -> None:
    with pytest.raises(BatteryFailure):
        run_check(POLICY_LOSSES, check, loss, gradients={"loss": "on_policy_gradient"})


def test_a_right_policy_loss_passes() -> None:
    run_battery(POLICY_LOSSES, right_loss, gradients={"loss": "policy_gradient"})


def centred(step: RewardBatch) -> list[float]:
    """r - mean of the group."""
    for part in step.parts:
        if not math.isfinite(part.reward):
            raise ValueError(part.part_id)
    result = [0.0] * len(step.parts)
    for indices in step.groups().values():
        mean = math.fsum(step.parts[index].reward for index in indices) / len(indices)
        for index in indices:
            result[index] = step.parts[index].reward - mean
    return result


def of_parts(step: RewardBatch, values: list[float]) -> Advantages:
    columns = tuple(spread_evenly(part, value) for part, value in zip(step.parts, values, strict=True))
    return Advantages(columns=columns, trainable=(True,) * len(step.parts))


def right_advantage(step: RewardBatch) -> Advantages:
    return of_parts(step, centred(step))


def grouped_by_position(step: RewardBatch) -> Advantages:
    """Every two neighbours are a group, which breaks when a rollout is lost."""
    rewards = [part.reward for part in step.parts]
    result = []
    for index, reward in enumerate(rewards):
        group = rewards[index - index % 2 : index - index % 2 + 2]
        result.append(reward - sum(group) / len(group))
    return of_parts(step, result)


def grouped_by_name(step: RewardBatch) -> Advantages:
    """Ids are compared as text, in a way that merges some of them."""
    merged = RewardBatch(
        parts=tuple(replace(part, group_id=str(len(part.group_id) > 4)) for part in step.parts)
    )
    return of_parts(step, centred(merged))


def by_token(step: RewardBatch) -> Advantages:
    """A baseline over tokens: an answer's length moves it (leave-one-out of repeated rewards is not RLOO)."""
    result = [0.0] * len(step.parts)
    for indices in step.groups().values():
        sizes = [step.parts[index].num_trainable for index in indices]
        total = math.fsum(step.parts[i].reward * size for i, size in zip(indices, sizes, strict=True))
        for index in indices:
            result[index] = step.parts[index].reward - total / max(sum(sizes), 1)
    return of_parts(step, result)


def mean_with_itself(step: RewardBatch) -> Advantages:
    return right_advantage(step)


def noise_in_masked_slots(step: RewardBatch) -> Advantages:
    result = right_advantage(step)
    return replace(result, columns=tuple(tuple(column + 1 for column in part) for part in result.columns))


def doubled(step: RewardBatch) -> Advantages:
    """In float64, which would double what is sent to the ranks."""
    result = right_advantage(step)
    columns: Any = tuple(tuple(column.astype(np.float64) for column in part) for part in result.columns)
    return replace(result, columns=columns)


def gae(values: Float64, reward: float, keep: Float64, *, gamma: float = 0.9, lam: float = 0.8) -> Float64:
    """Backwards over all of `values`, observations included where `keep` has them."""
    result, last, following = np.zeros(len(values)), 0.0, 0.0
    for t in range(len(values) - 1, -1, -1):
        delta = (reward if t == len(values) - 1 else 0.0) + gamma * following - values[t]
        last = (delta + gamma * lam * last) * keep[t]
        result[t], following = last, values[t]
    return result


def refuse_nan(step: RewardBatch) -> None:
    centred(step)


def through_observations(step: RewardBatch) -> Advantages:
    """The recursion reads the critic where nothing was sampled."""
    refuse_nan(step)
    columns: list[tuple[Float32, ...]] = []
    for part in step.parts:
        rows = []
        for sample in part.samples:
            assert sample.values is not None
            found = gae(sample.values.astype(float), part.reward, np.ones(len(sample.values)))
            rows.append(np.where(sample.sampled, found, 0.0).astype(np.float32))
        columns.append(tuple(rows))
    return Advantages(columns=tuple(columns), trainable=(True,) * len(step.parts))


def stopped_at_observations(step: RewardBatch) -> Advantages:
    """The return starts anew at every observation: only the last turn is paid."""
    refuse_nan(step)
    columns: list[tuple[Float32, ...]] = []
    for part in step.parts:
        rows = []
        for sample in part.samples:
            carried, row = part.reward, np.zeros(len(sample.sampled), dtype=np.float32)
            for t in range(len(row) - 1, -1, -1):
                carried = carried if sample.sampled[t] or not row.any() else 0.0
                row[t] = carried if sample.sampled[t] else 0.0
            rows.append(row)
        columns.append(tuple(rows))
    return Advantages(columns=tuple(columns), trainable=(True,) * len(step.parts))


def paid_in_every_context(step: RewardBatch) -> Advantages:
    """Discounted from the end of each context instead of the episode's."""
    refuse_nan(step)
    columns = tuple(
        tuple(
            np.where(sample.sampled, part.reward * 0.9 ** np.cumsum(sample.sampled[::-1])[::-1], 0).astype(
                np.float32
            )
            for sample in part.samples
        )
        for part in step.parts
    )
    return Advantages(columns=columns, trainable=(True,) * len(step.parts))


def right_gae(step: RewardBatch) -> Advantages:
    refuse_nan(step)
    columns = []
    for part in step.parts:
        samples, places, _ = trajectory(part)
        stacked = [sample.values for sample in part.samples]
        values = np.array([stacked[i][t] for i, t in zip(samples, places, strict=True)], dtype=float)
        columns.append(back(part, gae(values, part.reward, np.ones(len(values)))))
    return Advantages(columns=tuple(columns), trainable=(True,) * len(step.parts))


BROKEN_ADVANTAGES = [
    pytest.param(grouped_by_position, "permutation", marks=pytest.mark.catalogue("B7")),
    pytest.param(grouped_by_name, "names", marks=pytest.mark.catalogue("B6", "B8")),
    pytest.param(by_token, "gradient_as_loss", marks=pytest.mark.catalogue("B9")),
    pytest.param(mean_with_itself, "gradient_as_loss"),
    pytest.param(noise_in_masked_slots, "form"),
    pytest.param(doubled, "form", marks=pytest.mark.catalogue("B8")),
    pytest.param(through_observations, "deletion", marks=pytest.mark.catalogue("B2")),
    pytest.param(through_observations, "poison", marks=pytest.mark.catalogue("B2")),
    pytest.param(stopped_at_observations, "deletion", marks=pytest.mark.catalogue("B1")),
    pytest.param(paid_in_every_context, "segments", marks=pytest.mark.catalogue("B10")),
]


@pytest.mark.parametrize(("estimator", "check"), BROKEN_ADVANTAGES)
def test_a_broken_advantage_is_found(estimator: Any, check: str) -> None:
    with pytest.raises(BatteryFailure):
        run_check(ADVANTAGES, check, estimator, gradients={"loss": "policy_gradient"})


def test_right_advantages_pass() -> None:
    run_battery(ADVANTAGES, right_advantage, gradients={"loss": "scaled_policy_gradient"})
    run_battery(ADVANTAGES, right_gae)


def ones(mask: torch.Tensor) -> torch.Tensor:
    return mask.double()


BROKEN_REDUCERS = {
    "micro-batch": (lambda mask, batch, counts: ones(mask) / mask.sum().clamp(min=1), "split"),
    "width": (lambda mask, batch, counts: ones(mask) / max(mask.numel(), 1), "padding"),
    "growing": (
        lambda mask, batch, counts: ones(mask) / counts.tokens_of_sequence["sequence-0"],
        "duplication",
    ),
    "ignored": (lambda mask, batch, counts: torch.ones_like(ones(mask)) / counts.num_tokens, "form"),
    "signed": (lambda mask, batch, counts: ones(mask) * batch.advantages / counts.num_tokens, "form"),
}


@pytest.mark.catalogue("B14", "B15", "B16", "B17", "B20")
@pytest.mark.parametrize("name", BROKEN_REDUCERS)
def test_a_broken_reduction_is_found(name: str) -> None:
    reducer, check = BROKEN_REDUCERS[name]
    with pytest.raises(BatteryFailure):
        run_check(REDUCERS, check, reducer)


def clamped_k3(logprobs: torch.Tensor, other: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    gap = torch.where(mask, logprobs, 0.0) - torch.where(mask, other, 0.0)
    return (torch.exp(-gap) - 1 + gap).clamp(-10, 10)


def k1(logprobs: torch.Tensor, other: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return torch.where(mask, logprobs, 0.0) - torch.where(mask, other, 0.0)


@pytest.mark.catalogue("B13")
def test_a_clamped_kl_is_found() -> None:
    with pytest.raises(BatteryFailure, match="fades"):
        run_check(KL_ESTIMATORS, "pull", clamped_k3)
    with pytest.raises(BatteryFailure, match="not finite"):
        run_check(
            KL_ESTIMATORS, "overflow", lambda a, b, mask: k1(a, b, mask).neg().exp() - 1 + k1(a, b, mask)
        )


@pytest.mark.catalogue("B12")
@pytest.mark.parametrize(
    ("placement", "wrong", "right"),
    [
        ("loss", "reverse_kl", "zero"),
        ("reward", "zero", "reverse_kl"),
        ("loss_times_ratio", "biased", "reverse_kl"),
    ],
)
def test_a_false_claim_of_a_kl_is_found(placement: str, wrong: Any, right: Any) -> None:
    with pytest.raises(BatteryFailure):
        run_check(KL_ESTIMATORS, f"gradient_as_{placement}", k1, gradients={placement: wrong})
    run_check(KL_ESTIMATORS, f"gradient_as_{placement}", k1, gradients={placement: right})


def weights(values: torch.Tensor, **metrics: float) -> CorrectionWeights:
    return CorrectionWeights(weights=values, metrics=metrics)


def right_correction(
    behavior: torch.Tensor,
    proximal: torch.Tensor,
    mask: torch.Tensor,
    sequence_index: torch.Tensor,
    advantages: torch.Tensor,
) -> CorrectionWeights:
    gap = torch.where(mask, proximal, 0.0) - torch.where(mask, behavior, 0.0)
    found = torch.where(mask, gap.clamp(-20, 20).exp().clamp(max=2.0), 0.0)
    return weights(found, mean=float(found.sum() / mask.sum().clamp(min=1)))


BROKEN_CORRECTIONS = {
    "metric over all slots": (
        lambda b, p, m, i, a: weights(right_correction(b, p, m, i, a).weights, mean=float(m.double().mean())),
        "padding",
    ),
    "smallest weight is always 0": (
        lambda b, p, m, i, a: weights(
            right_correction(b, p, m, i, a).weights,
            least=float(right_correction(b, p, m, i, a).weights.min()),
        ),
        "deletion",
    ),
    "unclamped": (lambda b, p, m, i, a: weights(torch.where(m, (p - b).exp(), 0.0)), "overflow"),
    "dropped NaN": (
        lambda b, p, m, i, a: weights(right_correction(b, p, m, i, a).weights.nan_to_num()),
        "nan_shows",
    ),
    "not 1 where nothing differs": (
        lambda b, p, m, i, a: weights(right_correction(b, p, m, i, a).weights * (a > 0)),
        "identity",
    ),
    "by position": (lambda b, p, m, i, a: weights(m * torch.linspace(0, 1, len(m))), "permutation"),
}


@pytest.mark.catalogue("B34")
@pytest.mark.parametrize("name", BROKEN_CORRECTIONS)
def test_a_broken_correction_is_found(name: str) -> None:
    correction, check = BROKEN_CORRECTIONS[name]
    with pytest.raises(BatteryFailure):
        run_check(CORRECTIONS, check, correction)


def test_a_right_correction_passes() -> None:
    run_battery(CORRECTIONS, right_correction)


BROKEN_POSTPROCESSORS = {
    "one too few": (lambda rewards, parts: list(rewards)[1:], "form"),
    "by position": (lambda rewards, parts: [r + i for i, r in enumerate(rewards)], "permutation"),
    "by width": (
        lambda rewards, parts: [
            r - sum(len(s.sampled) for s in p.samples) for r, p in zip(rewards, parts, strict=True)
        ],
        "masked_slots",
    ),
    "by contexts": (
        lambda rewards, parts: [r - len(p.samples) for r, p in zip(rewards, parts, strict=True)],
        "segments",
    ),
    "what came before is lost": (lambda rewards, parts: [p.reward for p in parts], "chain"),
    "dropped NaN": (lambda rewards, parts: [0.0 if math.isnan(r) else r for r in rewards], "nan_shows"),
}


@pytest.mark.parametrize("name", BROKEN_POSTPROCESSORS)
def test_a_broken_postprocessing_is_found(name: str) -> None:
    postprocessor, check = BROKEN_POSTPROCESSORS[name]
    with pytest.raises(BatteryFailure):
        run_check(REWARD_POSTPROCESSORS, check, postprocessor)


def test_all_that_is_wrong_is_told_at_once() -> None:
    with pytest.raises(BatteryFailure, match=r"masked_slots: .*; poison: .*; split: "):
        run_battery(POLICY_LOSSES, lambda batch: plain(-batch.logprobs * batch.mask.sum(), batch))


def test_what_does_not_apply_can_be_left_out() -> None:
    def total(mask: torch.Tensor, batch: TokenBatch, counts: GlobalCounts) -> torch.Tensor:
        return ones(mask)

    registry: Registry[Any] = REDUCERS
    with pytest.raises(BatteryFailure, match="duplication"):
        run_battery(registry, total)
    run_battery(registry, total, skip=("duplication",))
