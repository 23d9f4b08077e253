"""Every registered function against its formula, written out in scalars; gradients by differences of the formula.

A stop-gradient is written as the token's `frozen` logprob, which the differences leave alone.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from polyturn.trainer.algorithms.advantages import RewardBatch, RewardPart
from polyturn.trainer.algorithms.registry import (
    ADVANTAGES,
    CORRECTIONS,
    ENTROPY_CONTROLS,
    KL_ESTIMATORS,
    POLICY_LOSSES,
    REDUCERS,
    REWARD_POSTPROCESSORS,
)
from polyturn.trainer.battery import Case, cases, steps, token_weights
from polyturn.trainer.battery.rewards import trained
from polyturn.trainer.battery.rows import Row, count, random_rows
from polyturn.trainer.battery.token_losses import evaluate

exp, log = math.exp, math.log


@dataclass(frozen=True, kw_only=True, slots=True)
class Token:
    """A trainable token."""

    live: float
    """Its logprob, as far as it carries a gradient."""
    frozen: float
    """The same where no gradient is taken."""
    proximal: float
    behavior: float
    advantage: float

    def anchor(self, config: Any) -> float:
        return self.behavior if config.anchor == "behavior" else self.proximal


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def bound(value: float, low: float, high: float) -> float:
    return min(max(value, low), high)


def surrogate(ratio: float, token: Token, config: Any) -> float:
    clipped = bound(ratio, 1 - config.clip_low, 1 + config.clip_high)
    return -min(ratio * token.advantage, clipped * token.advantage)


def clip(tokens: Sequence[Token], c: Any) -> list[float]:
    values = [surrogate(exp(t.live - t.anchor(c)), t, c) for t in tokens]
    if c.dual_clip is None:
        return values
    return [
        min(v, c.dual_clip * abs(t.advantage)) if t.advantage < 0 else v
        for v, t in zip(values, tokens, strict=True)
    ]


def gspo(tokens: Sequence[Token], c: Any) -> list[float]:
    if c.form == "token":
        ratio = exp(mean([t.frozen - t.anchor(c) for t in tokens]))
        return [surrogate(ratio * exp(t.live - t.frozen), t, c) for t in tokens]
    ratio = exp(mean([t.live - t.anchor(c) for t in tokens]))
    return [surrogate(ratio, t, c) for t in tokens]


def luspo(tokens: Sequence[Token], c: Any) -> list[float]:
    ratio = exp(mean([t.live - t.anchor(c) for t in tokens]))
    return [len(tokens) * surrogate(ratio, t, c) for t in tokens]


def gmpo(tokens: Sequence[Token], c: Any) -> list[float]:
    bounded = [
        min(t.live - t.anchor(c), c.clip_high) if t.advantage > 0 else max(t.live - t.anchor(c), -c.clip_low)
        for t in tokens
    ]
    return [-t.advantage * exp(mean(bounded)) for t in tokens]


def vespo(tokens: Sequence[Token], c: Any) -> list[float]:
    w = exp(sum(t.frozen - t.anchor(c) for t in tokens))
    values = []
    for t in tokens:
        k, rate = (
            (c.power_positive, c.rate_positive) if t.advantage >= 0 else (c.power_negative, c.rate_negative)
        )
        values.append(-(w**k) * exp(rate * (1 - w)) * t.advantage * t.live)
    return values


def cispo(tokens: Sequence[Token], c: Any) -> list[float]:
    weights = [bound(exp(t.frozen - t.anchor(c)), c.ratio_floor, c.ratio_cap) for t in tokens]
    return [-w * t.advantage * t.live for w, t in zip(weights, tokens, strict=True)]


def sapo(tokens: Sequence[Token], c: Any) -> list[float]:
    values = []
    for t in tokens:
        tau = c.temperature_positive if t.advantage > 0 else c.temperature_negative
        ratio = exp(t.live - t.anchor(c))
        values.append(-4 / tau / (1 + exp(-tau * (ratio - 1))) * t.advantage)
    return values


def dppo(tokens: Sequence[Token], c: Any) -> list[float]:
    values = []
    for t in tokens:
        now, before = exp(t.frozen), exp(t.anchor(c))
        distance = abs(now - before)
        if c.divergence == "kl":
            distance = before * log(before / now) + (1 - before) * log((1 - before) / (1 - now))
        up = t.advantage > 0 and now > before and distance > c.threshold_high
        down = t.advantage < 0 and now < before and distance > c.threshold_low
        value = 0.0 if up or down else -exp(t.live - t.anchor(c)) * t.advantage
        values.append(value + c.drift_penalty * (t.live - t.anchor(c)) ** 2)
    return values


def topr(tokens: Sequence[Token], c: Any) -> list[float]:
    weights = [1.0 if t.advantage >= 0 else min(exp(t.frozen - t.anchor(c)), c.ratio_cap) for t in tokens]
    return [-w * t.advantage * t.live for w, t in zip(weights, tokens, strict=True)]


LOSSES: dict[str, Callable[[Sequence[Token], Any], list[float]]] = {
    "clip": clip,
    "gspo": gspo,
    "luspo": luspo,
    "gmpo": gmpo,
    "vespo": vespo,
    "cispo": cispo,
    "sapo": sapo,
    "dppo": dppo,
    "topr": topr,
    "reinforce": lambda tokens, c: [-exp(t.frozen - t.anchor(c)) * t.advantage * t.live for t in tokens],
    "policy_gradient": lambda tokens, c: [-t.advantage * t.live for t in tokens],
    "supervised": lambda tokens, c: [-t.live for t in tokens],
}


def config_of(case: Case) -> Any:
    return case.function.keywords["config"] if case.entry.config else None


def tokens_of(row: Row) -> list[Token]:
    names = ("logprobs", "logprobs", "proximal_logprobs", "behavior_logprobs", "advantages")
    found = zip(*(row.columns[name][row.mask].tolist() for name in names), strict=True)
    return [Token(live=a, frozen=b, proximal=c, behavior=d, advantage=e) for a, b, c, d, e in found]


def probable(row: Row) -> Row:
    """Anchors that are probabilities, too."""
    names = ("proximal_logprobs", "behavior_logprobs")
    return row.having(**{name: row.columns[name].clamp(max=-0.05) for name in names})


@pytest.mark.parametrize("case", cases(POLICY_LOSSES), ids=lambda case: case.name)
@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_policy_losses(case: Case, scale: float) -> None:
    """With ratios far from 1, and within the narrowest clip."""
    formula, config = LOSSES[case.entry.name], config_of(case)
    rows = [probable(row) for row in random_rows(11)]
    near = [
        row.having(
            **{
                name: row.columns["logprobs"] + scale * (row.columns[name] - row.columns["logprobs"])
                for name in ("proximal_logprobs", "behavior_logprobs")
            }
        )
        for row in rows
    ]
    found = evaluate(case.function, near)
    for row, values, gradients in zip(
        near, found.columns["value"], found.columns["gradient by logprobs"], strict=True
    ):
        tokens = tokens_of(row)
        if not tokens:
            continue
        assert values[row.mask].tolist() == pytest.approx(formula(tokens, config), rel=1e-9, abs=1e-9)
        cotangents = row.columns["cotangents"][row.mask].tolist()
        for place, slope in enumerate(gradients[row.mask].tolist()):
            totals = []
            for step in (1e-6, -1e-6):
                moved = list(tokens)
                moved[place] = replace(moved[place], live=moved[place].live + step)
                totals.append(sum(x * y for x, y in zip(cotangents, formula(moved, config), strict=True)))
            assert slope == pytest.approx((totals[0] - totals[1]) / 2e-6, rel=1e-5, abs=1e-6)


KL: dict[str, Callable[[float], float]] = {
    "k1": lambda d: d,
    "k2": lambda d: d * d / 2,
    "k3": lambda d: exp(-d) - 1 + d,
}


@pytest.mark.parametrize("case", cases(KL_ESTIMATORS), ids=lambda case: case.name)
def test_kl_estimators(case: Case) -> None:
    gaps = torch.linspace(-5, 5, 21, dtype=torch.float64)
    found = case.function(gaps - 1, torch.full_like(gaps, -1), torch.ones_like(gaps, dtype=torch.bool))
    assert found.tolist() == pytest.approx([KL[case.entry.name](d) for d in gaps.tolist()], abs=1e-12)


def weight(kind: str, row: Row, rows: Sequence[Row], config: Any) -> float:
    """The weight of a trainable token of the row."""
    tokens: dict[str, int] = defaultdict(int)
    prompts: dict[str, int] = defaultdict(int)
    for other in rows:
        if other.num_trainable:
            tokens[other.sequence] += other.num_trainable
            prompts[other.prompt] += other.num_trainable
    return {
        "token_mean": lambda: 1 / sum(tokens.values()),
        "sequence_mean": lambda: 1 / (len(tokens) * tokens[row.sequence]),
        "sequence_sum": lambda: 1 / len(tokens),
        "sequence_sum_norm": lambda: 1 / (len(tokens) * config.length),
        "prompt_mean": lambda: 1 / (len(prompts) * prompts[row.prompt]),
        "token_sum": lambda: 1.0,
    }[kind]()


REDUCTIONS = ("token_mean", "sequence_mean", "sequence_sum", "sequence_sum_norm", "prompt_mean", "token_sum")


@pytest.mark.catalogue("B20")
@pytest.mark.parametrize("case", cases(REDUCERS), ids=lambda case: case.name)
def test_reductions(case: Case) -> None:
    rows = random_rows(4)
    for row, weights in zip(rows, token_weights.weigh(case.function, rows, count(rows)), strict=True):
        for found in weights[row.mask].tolist():
            assert found == pytest.approx(weight(case.entry.name, row, rows, config_of(case)), rel=1e-6)


def estimate(estimator: str, gap: float) -> float:
    return KL[estimator](gap)


def rejection(
    keep: Callable[[list[float], Any], bool],
) -> Callable[[list[float], list[float], Any], list[float]]:
    return lambda logs, _, c: [float(keep(logs, c))] * len(logs)


def truncated(logs: list[float], _: list[float], c: Any) -> list[float]:
    together = {"sequence": sum(logs), "geometric": mean(logs)}.get(c.level)
    return [min(exp(x if together is None else together), c.cap) for x in logs]


CORRECTED: dict[str, Callable[[list[float], list[float], Any], list[float]]] = {
    "truncated_importance": truncated,
    "icepop": lambda logs, _, c: [exp(x) if c.low <= exp(x) <= c.high else 0.0 for x in logs],
    "geometric_rejection": rejection(lambda logs, c: c.low <= exp(mean(logs)) <= c.high),
    "divergence_rejection": rejection(
        lambda logs, c: (
            {"sum": sum, "mean": mean, "max": max}[c.over_tokens]([estimate(c.estimator, -x) for x in logs])
            <= c.threshold
        )
    ),
    "veto": rejection(lambda logs, c: all(c.low <= exp(x) <= c.high for x in logs)),
    "off_policy_sequence_mask": lambda logs, advantages, c: [
        float(a >= 0 or mean([-x for x in logs]) <= c.threshold) for a in advantages
    ],
}


@pytest.mark.parametrize("case", cases(CORRECTIONS), ids=lambda case: case.name)
@pytest.mark.parametrize("scale", [1.0, 0.02])
def test_corrections(case: Case, scale: float) -> None:
    """Of samplers that are far away, and near."""
    config = config_of(case)
    rows = []
    for row in random_rows(9):
        gap = row.columns["proximal_logprobs"] - row.columns["behavior_logprobs"]
        rows.append(row.having(proximal_logprobs=row.columns["behavior_logprobs"] + scale * gap))
    expected: list[float] = []
    counted: list[float] = []
    for row in rows:
        tokens = tokens_of(row)
        logs = [t.proximal - t.behavior for t in tokens]
        found = CORRECTED[case.entry.name](logs, [t.advantage for t in tokens], config) if tokens else []
        expected += found
        counted += found if getattr(config, "level", "token") == "token" else found[:1]
    if getattr(config, "normalize", False):
        expected = [value / mean(counted) for value in expected]
    weights, _ = token_weights.correct(case.function, rows)
    found = [value for row, values in zip(rows, weights, strict=True) for value in values[row.mask].tolist()]
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-9)


def covariances_of(tokens: list[Token]) -> list[float]:
    middle, worth = mean([t.proximal for t in tokens]), mean([t.advantage for t in tokens])
    return [(t.proximal - middle) * (t.advantage - worth) for t in tokens]


CONTROLLED: dict[str, Callable[[list[float], list[float], list[float], Any], None]] = {}
"""What must hold of the weights and penalties of tokens with these covariances."""


def clip_cov(found: list[float], weights: list[float], holds: list[float], c: Any) -> None:
    number = max(int(c.fraction * len(found)), 1)
    inside = [c.low <= value <= c.high for value in found]
    chosen = [weight == 0 for weight in weights]
    assert number < sum(inside) < len(found), (
        "the example draws some of those inside, and leaves some outside"
    )
    assert sum(chosen) == number and all(where for where, drawn in zip(inside, chosen, strict=True) if drawn)
    assert set(weights) == {0.0, 1.0} and not any(holds)


def kl_cov(found: list[float], weights: list[float], holds: list[float], c: Any) -> None:
    number = max(int(c.fraction * len(found)), 1)
    least = sorted(found)[-number]
    assert weights == [1.0] * len(found)
    assert holds == [c.coefficient if value >= least else 0.0 for value in found]


CONTROLLED |= {"clip_cov": clip_cov, "kl_cov": kl_cov}


@pytest.mark.parametrize("case", cases(ENTROPY_CONTROLS), ids=lambda case: case.name)
@pytest.mark.parametrize("seed", [1, 9])
def test_entropy_controls(case: Case, seed: int) -> None:
    rows = random_rows(seed)
    logprobs, worth = (
        torch.cat([row.columns[name] for row in rows]) for name in ("proximal_logprobs", "advantages")
    )
    mask = torch.cat([row.mask for row in rows])
    found = case.function(logprobs, worth, mask)
    expected = covariances_of([token for row in rows for token in tokens_of(row)])
    weights, holds = found.weights[mask].tolist(), found.kl_weights[mask].tolist()
    CONTROLLED[case.entry.name](expected, weights, holds, config_of(case))
    assert found.metrics["covariance"] == pytest.approx(mean(expected))
    assert found.metrics["chosen_tokens"] == max(int(0.2 * len(expected)), 1)


def test_clip_cov_draws_evenly() -> None:
    """Of 2,000 tokens of one covariance's range each is as likely: neither by size nor by place."""
    (case,) = (case for case in cases(ENTROPY_CONTROLS) if case.name == "clip_cov")
    generator = torch.Generator().manual_seed(0)
    logprobs, worth = (torch.rand(2000, generator=generator, dtype=torch.float64) for _ in range(2))
    found = case.function(logprobs, worth, torch.ones(2000, dtype=torch.bool))
    chosen = (found.weights == 0).nonzero().flatten().double()
    assert len(chosen) == 400
    # Four standard deviations of the mean of 400 draws without replacement.
    for values, every in ((chosen, torch.arange(2000.0)), (logprobs[chosen.long()], logprobs)):
        assert abs(float(values.mean() - every.mean())) < 4 * float(every.std()) * (0.8 / 400) ** 0.5


Trajectories = list[list[float]]
"""By part: one number for each of its trainable tokens, as they were sampled."""


def standard(values: Sequence[float], config: Any) -> list[float]:
    if max(values) - min(values) < max(config.min_spread, 1e-300):
        return [0.0] * len(values)
    return [(v - mean(values)) / (statistics.stdev(values) + config.epsilon) for v in values]


def by_group(
    step: RewardBatch, values: Sequence[float], compare: Callable[[list[float]], list[float]]
) -> list[float]:
    result = [0.0] * len(step.parts)
    for indices in step.groups().values():
        for index, value in zip(indices, compare([values[i] for i in indices]), strict=True):
            result[index] = value
    return result


def rewards(step: RewardBatch) -> list[float]:
    return [part.reward for part in step.parts]


def centred(step: RewardBatch, compare: Callable[[list[float]], list[float]]) -> Trajectories:
    values = by_group(step, rewards(step), compare)
    return [[value] * part.num_trainable for value, part in zip(values, step.parts, strict=True)]


def opo(step: RewardBatch, config: Any) -> Trajectories:
    result: Trajectories = [[]] * len(step.parts)
    for indices in step.groups().values():
        parts = [step.parts[i] for i in indices]
        baseline = sum(p.num_trainable * p.reward for p in parts) / sum(p.num_trainable for p in parts)
        for i, part in zip(indices, parts, strict=True):
            result[i] = [part.reward - baseline] * part.num_trainable
    return result


def gdpo(step: RewardBatch, config: Any) -> Trajectories:
    names = sorted(step.parts[0].reward_parts)
    columns = [
        by_group(step, [part.reward_parts[name] for part in step.parts], lambda v: standard(v, config))
        for name in names
    ]
    sums = [sum(values) for values in zip(*columns, strict=True)]
    if config.normalize_batch:
        sums = [(v - mean(sums)) / (statistics.stdev(sums) + config.epsilon) for v in sums]
    return [[v] * part.num_trainable for v, part in zip(sums, step.parts, strict=True)]


def turns_of(part: RewardPart) -> list[int]:
    return sorted(turn for sample in part.samples for turn in sample.turns[sample.sampled].tolist())


def paid(part: RewardPart, outcome: float, *, by_turn: bool) -> list[float]:
    turns = turns_of(part)
    result = [0.0] * len(turns)
    for turn, reward in enumerate(part.turn_rewards if by_turn else ()):
        result[max(i for i, t in enumerate(turns) if t == turn)] += reward
    if not by_turn:
        result[-1] += outcome
    return result


def returns(values: list[float], gamma: float) -> list[float]:
    return [sum(gamma ** (j - i) * values[j] for j in range(i, len(values))) for i in range(len(values))]


def baseline(step: RewardBatch, config: Any) -> Trajectories:
    outcomes = by_group(step, rewards(step), lambda v: [x - mean(v) for x in v])
    return [
        returns(paid(part, value, by_turn=False), config.gamma)
        for part, value in zip(step.parts, outcomes, strict=True)
    ]


def gae(step: RewardBatch, config: Any) -> Trajectories:
    result = []
    for part in step.parts:
        pairs = sorted(
            (
                (turn, index, place, value)
                for index, sample in enumerate(part.samples)
                for place, (turn, kept, value) in enumerate(
                    zip(sample.turns.tolist(), sample.sampled.tolist(), sample.values.tolist(), strict=True)
                )
                if kept
            ),
        )
        turns, values = [pair[0] for pair in pairs], [pair[3] for pair in pairs]
        rho = paid(part, part.reward, by_turn=config.pay_turns)
        advantages, last, following = [0.0] * len(values), 0.0, 0.0
        for t in range(len(values) - 1, -1, -1):
            steps_ahead = 1
            if config.per == "turn" and t + 1 < len(turns):
                steps_ahead = turns[t + 1] - turns[t]
            decay = config.gae_lambda
            if config.length_adaptive:
                decay = max(0.0, 1 - 1 / (config.length_adaptive * len(values)))
            gamma, decay = config.gamma**steps_ahead, decay**steps_ahead
            last = rho[t] + gamma * following - values[t] + gamma * decay * last
            advantages[t], following = last, values[t]
        result.append(advantages)
    return result


def per_turn(step: RewardBatch, values: list[list[float]]) -> Trajectories:
    return [
        [of_turn[turn] for turn in turns_of(part)] for part, of_turn in zip(step.parts, values, strict=True)
    ]


def turn_level(step: RewardBatch, config: Any) -> Trajectories:
    found = [returns(list(part.turn_rewards), config.gamma) for part in step.parts]
    result = [[0.0] * len(values) for values in found]
    for indices in step.groups().values():
        compared: list[float] = []
        for turn in range(max(len(found[i]) for i in indices)):
            here = [i for i in indices if turn < len(found[i])]
            compared = [found[i][turn] for i in here] if len(here) > 1 else compared
            scale = statistics.stdev(compared) + config.epsilon if config.scale == "std" else 1.0
            for i in here:
                result[i][turn] = (found[i][turn] - mean(compared)) / scale
    return per_turn(step, result)


def gigpo(step: RewardBatch, config: Any) -> Trajectories:
    def norm(values: list[float]) -> list[float]:
        if config.scale == "std":
            return standard(values, config)
        return [v - mean(values) for v in values]

    found = [returns(list(part.turn_rewards), config.gamma) for part in step.parts]
    result = [[v] * len(x) for v, x in zip(by_group(step, rewards(step), norm), found, strict=True)]
    states = defaultdict(list)
    for i, part in enumerate(step.parts):
        for turn, anchor in enumerate(part.anchors):
            states[part.group_id, anchor].append((i, turn))
    for members in states.values():
        if len(members) > 1:
            for (i, turn), value in zip(members, norm([found[i][t] for i, t in members]), strict=True):
                result[i][turn] += config.step_weight * value
    return per_turn(step, result)


ESTIMATED: dict[str, Callable[[RewardBatch, Any], Trajectories]] = {
    "none": lambda step, c: centred(step, lambda v: [0.0] * len(v)),
    "grpo": lambda step, c: centred(step, lambda v: standard(v, c)),
    "dr_grpo": lambda step, c: centred(step, lambda v: [x - mean(v) for x in v]),
    "rloo": lambda step, c: centred(step, lambda v: [x - (sum(v) - x) / (len(v) - 1) for x in v]),
    # No group of the step is uniform, so nothing is made up for.
    "gpg": lambda step, c: centred(step, lambda v: [x - mean(v) for x in v]),
    "opo": opo,
    "maxrl": lambda step, c: centred(step, lambda v: [(x - mean(v)) / mean(v) for x in v]),
    "gdpo": gdpo,
    "reinforce_plus_plus": lambda step, c: [
        returns(paid(part, part.reward, by_turn=c.pay_turns), c.gamma) for part in step.parts
    ],
    "reinforce_plus_plus_baseline": baseline,
    "ppo_gae": gae,
    "turn_level": turn_level,
    "gigpo": gigpo,
    # No episode of the step is a branch; `test_advantages_trees` has some.
    "tree_grpo": lambda step, c: centred(step, lambda v: standard(v, c)),
}


@pytest.mark.catalogue("B1", "B2", "B5")
@pytest.mark.parametrize("case", cases(ADVANTAGES), ids=lambda case: case.name)
def test_advantages(case: Case) -> None:
    step = steps.random_step(5, sizes={"four": 4, "two": 2, "three": 3})
    config = config_of(case)
    expected = ESTIMATED[case.entry.name](step, config)
    if config.whiten:
        flat = [value for values in expected for value in values]
        scale = statistics.stdev(flat) + 1e-8
        expected = [[(value - mean(flat)) / scale for value in values] for values in expected]
    for part, found, values in zip(step.parts, trained(step, case.function(step)), expected, strict=True):
        in_order = [
            v for _, v in sorted(zip(_turns(part), found.tolist(), strict=True), key=lambda pair: pair[0])
        ]
        assert in_order == pytest.approx(values, rel=2e-5, abs=2e-5)


def _turns(part: RewardPart) -> list[int]:
    """Of the trainable tokens, sample after sample."""
    return [turn for sample in part.samples for turn in sample.turns[sample.sampled].tolist()]


def overlong(step: RewardBatch, c: Any) -> list[float]:
    result = []
    for part in step.parts:
        over = part.num_trainable - (c.max_tokens - c.buffer_tokens)
        result.append(part.reward - c.factor * bound(over / c.buffer_tokens, 0, 1))
    return result


SHAPED: dict[str, Callable[[RewardBatch, Any], list[float]]] = {"overlong": overlong}


@pytest.mark.parametrize("case", cases(REWARD_POSTPROCESSORS), ids=lambda case: case.name)
def test_postprocessing(case: Case) -> None:
    step = steps.random_step(2)
    found = case.function(rewards(step), step.parts)
    assert list(found) == pytest.approx(SHAPED[case.entry.name](step, config_of(case)))


def test_every_registered_function_has_a_closed_form() -> None:
    for registry, forms in (
        (POLICY_LOSSES, LOSSES),
        (ADVANTAGES, ESTIMATED),
        (CORRECTIONS, CORRECTED),
        (ENTROPY_CONTROLS, CONTROLLED),
        (KL_ESTIMATORS, KL),
        (REWARD_POSTPROCESSORS, SHAPED),
    ):
        assert {entry.name for entry in registry} <= set(forms)
    assert {entry.name for entry in REDUCERS} <= set(REDUCTIONS)
