"""Advantages that differ between the tokens of an episode: returns along its tokens, and credit for its turns.

Observations are no part of a trajectory, so nothing ends, discounts or bootstraps at them: deleting them changes
nothing. An episode that a limit ended is worth nothing beyond its end, like any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from polyturn.configs.schema.algorithm import (
    GAEAdvantage,
    GiGPOAdvantage,
    ReinforcePlusPlusAdvantage,
    ReinforcePlusPlusBaselineAdvantage,
    TurnAdvantage,
)
from polyturn.trainer.algorithms.advantages import (
    Advantages,
    Float64,
    Group,
    RewardBatch,
    RewardPart,
    along,
    back,
    by_group,
    by_outcome,
    deviation,
    finish,
    mean,
    outcomes,
    spread,
    telling_rewards,
    trajectory,
)
from polyturn.trainer.algorithms.registry import ADVANTAGES


@ADVANTAGES.register(
    "reinforce_plus_plus",
    formula="G_t = rho_t + gamma G_next, rho_t = r at the last token - beta k1_t; A = whiten(G)",
    paper="2501.03262",
    config=ReinforcePlusPlusAdvantage,
    gradients={"loss": "biased"},
)
def reinforce_plus_plus(step: RewardBatch, config: ReinforcePlusPlusAdvantage) -> Advantages:
    """REINFORCE++: no groups; the baseline and the scale are those of the whole step's tokens."""
    outcomes(step)
    paid = [token_rewards(part, part.reward, pay_turns=config.pay_turns) for part in step.parts]
    return finish(step, discounted_sums(paid, [config.gamma] * len(paid)), config=config)


@ADVANTAGES.register(
    "reinforce_plus_plus_baseline",
    formula="as reinforce_plus_plus with r - mean in place of r",
    paper="2501.03262",
    config=ReinforcePlusPlusBaselineAdvantage,
    gradients={"loss": "biased"},
)
def reinforce_plus_plus_baseline(step: RewardBatch, config: ReinforcePlusPlusBaselineAdvantage) -> Advantages:
    """REINFORCE++-baseline: the group's mean reward is taken off each outcome; penalties stay with their tokens."""

    def compare(group: Group) -> list[float]:
        centre = mean(group.values)
        return [value - centre for value in group.values]

    outcomes(step)
    rewards = [part.reward for part in step.parts]
    compared = by_group(step, rewards, compare, config=config, telling=telling_rewards(step, config))
    paid = [
        token_rewards(part, outcome, pay_turns=False)
        for part, outcome in zip(step.parts, compared.advantages, strict=True)
    ]
    return finish(
        step,
        discounted_sums(paid, [config.gamma] * len(paid)),
        config=config,
        trainable=compared.trainable,
        metrics=compared.metrics,
    )


@ADVANTAGES.register(
    "ppo_gae",
    formula="delta_t = rho_t + gamma V_next - V_t; A_t = delta_t + gamma lambda A_next; return = A + V",
    paper="1506.02438, 2504.05118",
    config=GAEAdvantage,
    gradients={"loss": "biased"},
)
def ppo_gae(step: RewardBatch, config: GAEAdvantage) -> Advantages:
    """Generalised advantage estimation. Returns are those before whitening.

    Raises:
        ValueError: there are no values.
    """
    outcomes(step)
    inputs = [_gae_inputs(part, config) for part in step.parts]
    deltas = [each.rewards + each.discounts * _next(each.values) - each.values for each in inputs]
    advantages = discounted_sums(deltas, [each.discounts * each.decays for each in inputs])
    returns = tuple(
        back(part, advantage + each.values)
        for part, advantage, each in zip(step.parts, advantages, inputs, strict=True)
    )
    errors = np.concatenate([*advantages, np.zeros(0)])
    values = np.concatenate([*(each.values for each in inputs), np.zeros(0)])
    metrics = {
        "critic/value_mean": float(values.mean()) if values.size else 0.0,
        "critic/return_mean": float((values + errors).mean()) if values.size else 0.0,
        "critic/explained_variance": _explained(values, values + errors),
    }
    return finish(step, advantages, config=config, returns=returns, metrics=metrics)


def token_rewards(part: RewardPart, outcome: float, *, pay_turns: bool) -> Float64:
    """What each token of the part's trajectory is paid, [N]: the outcome at its end or turn by turn, less penalties.

    A turn without trainable tokens is paid at the last such token before it, or at the first of all.
    """
    rewards = -along(part, [sample.penalties for sample in part.samples])
    turns = trajectory(part)[2]
    if not len(rewards):
        return rewards
    if pay_turns and part.turn_rewards:
        ends = np.searchsorted(turns, np.arange(len(part.turn_rewards)), side="right") - 1
        np.add.at(rewards, ends.clip(min=0), part.turn_rewards)
    else:
        rewards[-1] += outcome
    return rewards


def discounted_sums(rewards: Sequence[Float64], discounts: Sequence[float | Float64]) -> list[Float64]:
    """For each trajectory x_t = reward_t + discount_t x_{t+1}, nothing beyond its end.

    All trajectories are worked off at once, so the time goes by the longest of them.
    """
    longest = max(map(len, rewards), default=0)
    sums = np.zeros((longest + 1, len(rewards)))
    factors = np.zeros((longest, len(rewards)))
    for column, (values, factor) in enumerate(zip(rewards, discounts, strict=True)):
        sums[: len(values), column] = values
        factors[: len(values), column] = factor
    for row in range(longest - 1, -1, -1):
        sums[row] += factors[row] * sums[row + 1]
    return [sums[: len(values), column].copy() for column, values in enumerate(rewards)]


@dataclass(frozen=True, kw_only=True, slots=True)
class _GAEInputs:
    """Along one trajectory, [N] each."""

    rewards: Float64
    values: Float64
    discounts: Float64
    """gamma from each token to the next."""
    decays: Float64
    """lambda from each token to the next."""


def _gae_inputs(part: RewardPart, config: GAEAdvantage) -> _GAEInputs:
    if any(sample.values is None and sample.sampled.any() for sample in part.samples):
        raise ValueError("the advantage ppo_gae needs a critic's values, and there are none")
    values = along(part, [sample.values for sample in part.samples])
    decay = config.gae_lambda
    if config.length_adaptive > 0 and len(values):
        decay = max(0.0, 1 - 1 / (config.length_adaptive * len(values)))
    steps = np.ones(len(values))
    if config.per == "turn":
        turns = trajectory(part)[2]
        steps[:-1] = np.diff(turns)
    return _GAEInputs(
        rewards=token_rewards(part, part.reward, pay_turns=config.pay_turns),
        values=values,
        discounts=np.power(config.gamma, steps),
        decays=np.power(decay, steps),
    )


def _next(values: Float64) -> Float64:
    """The value of the next token, 0 after the last."""
    return np.append(values[1:], 0.0) if len(values) else values


def _explained(values: Float64, returns: Float64) -> float:
    """1 - var(return - value) / var(return); 0 where the returns do not differ."""
    spread = float(returns.var()) if returns.size else 0.0
    return 1 - float((returns - values).var()) / spread if spread > 0 else 0.0


@ADVANTAGES.register(
    "turn_level",
    formula="R_k = sum over j >= k of gamma^(j-k) r_j; A = (R_k - mean_k) / (std_k + epsilon), by turn k",
    paper="2505.11821",
    config=TurnAdvantage,
    gradients={"loss": "biased"},
)
def turn_level(step: RewardBatch, config: TurnAdvantage) -> Advantages:
    """The return from each turn on, compared with those of the group's episodes that got as far.

    A turn that only one episode of the group reached is compared with the returns from the last turn that two reached.
    With all of the reward at the end, gamma 1 and equally many turns, this is GRPO; without scale, Dr.GRPO.
    """
    outcomes(step)
    returns, own = turn_returns(step, config.gamma), turn_returns(step.own, config.gamma)
    rewards = [part.reward for part in step.parts]
    whole = by_group(
        step, rewards, lambda group: group.values, config=config, telling=telling_rewards(step, config)
    )
    metrics = dict(whole.metrics)
    trainable = list(whole.trainable)
    values = [np.zeros(len(turns)) for turns in returns]
    flat_groups = 0
    for indices in step.groups().values():
        if len(indices) == 1:
            values[indices[0]] += whole.advantages[indices[0]]
            continue
        told_alike = config.uniform_by is not None and whole.uniform[indices[0]]
        differ = not told_alike and _compare_turns(indices, returns, own, values, config)
        flat_groups += not differ
        for index in indices:
            trainable[index] = differ or config.uniform != "drop"
    metrics |= {"group/num_uniform": float(flat_groups), "group/num_near_uniform": 0.0}
    return finish(step, _by_turn(step, values), config=config, trainable=trainable, metrics=metrics)


@ADVANTAGES.register(
    "gigpo",
    formula="A = norm of the group(r) + omega norm of the state group(R_k), R_k = sum over j >= k of gamma^(j-k) r_j",
    paper="2505.10978",
    config=GiGPOAdvantage,
    gradients={"loss": "biased"},
)
def gigpo(step: RewardBatch, config: GiGPOAdvantage) -> Advantages:
    """GiGPO: episodes are compared within their group, and so are steps taken in one state of one group.

    A state is told by its anchor, within its group only. A step alone in its state, or of a state that is not known,
    has no step advantage.
    """
    returns, own = turn_returns(step, config.gamma), turn_returns(step.own, config.gamma)

    def compare(group: Group) -> list[float]:
        return _normalized(group.values, config)

    whole = by_outcome(step, compare, config=config, min_spread=config.min_spread)
    groups = step.groups()
    states: dict[tuple[str, str], list[tuple[int, int]]] = {}
    num_steps = 0
    for index, (part, turns) in enumerate(zip(step.parts, returns, strict=True)):
        num_steps += len(turns)
        for turn in range(min(len(turns), len(part.anchors))):
            if part.anchors[turn]:
                states.setdefault((part.group_id, part.anchors[turn]), []).append((index, turn))
    values = [np.full(len(turns), value) for turns, value in zip(returns, whole.advantages, strict=True)]
    trainable = list(whole.trainable)
    num_compared = 0
    for members in states.values():
        found = [float(returns[index][turn]) for index, turn in members]
        num_compared += len(members) if len(members) > 1 else 0
        told_alike = config.uniform_by is not None and whole.uniform[members[0][0]]
        telling = [float(own[index][turn]) for index, turn in members]
        if len(members) == 1 or told_alike or not _differ(telling, config):
            continue
        for (index, turn), value in zip(members, _normalized(found, config), strict=True):
            values[index][turn] += config.step_weight * value
            trainable[index] |= len(groups[step.parts[index].group_id]) > 1
    metrics = {
        **whole.metrics,
        "gigpo/num_states": float(len(states)),
        "gigpo/compared_fraction": num_compared / num_steps if num_steps else 0.0,
    }
    return finish(step, _by_turn(step, values), config=config, trainable=trainable, metrics=metrics)


def turn_returns(step: RewardBatch, gamma: float) -> list[Float64]:
    """By part, the discounted return from each turn on; where turns have no rewards, the last one has all."""
    return discounted_sums([_turn_rewards(part) for part in step.parts], [gamma] * len(step.parts))


def _turn_rewards(part: RewardPart) -> Float64:
    turns = trajectory(part)[2]
    num_turns = max(len(part.turn_rewards), int(turns[-1]) + 1 if len(turns) else 1)
    rewards = np.zeros(num_turns)
    if part.turn_rewards:
        rewards[: len(part.turn_rewards)] = part.turn_rewards
    else:
        rewards[-1] = part.reward
    return rewards


def _compare_turns(
    indices: list[int],
    returns: list[Float64],
    own: list[Float64],
    values: list[Float64],
    config: TurnAdvantage,
) -> bool:
    """Fill in the advantages of one group's turns. Whether any differ, by the returns before shaping (`own`)."""
    differ = False
    baseline: list[float] = []
    telling: list[float] = []
    for turn in range(max(len(returns[index]) for index in indices)):
        reached = [index for index in indices if turn < len(returns[index])]
        if len(reached) > 1:
            baseline = [float(returns[index][turn]) for index in reached]
            telling = [float(own[index][turn]) for index in reached]
        if not _differ(telling, config):
            continue
        differ = True
        scale = deviation(baseline) + config.epsilon if config.scale == "std" else 1.0
        for index in reached:
            values[index][turn] = (returns[index][turn] - mean(baseline)) / scale
    return differ


def _differ(values: list[float], config: TurnAdvantage | GiGPOAdvantage) -> bool:
    differ_by = spread(values)
    return differ_by > 0.0 and (config.scale == "none" or differ_by >= config.min_spread)


def _normalized(values: tuple[float, ...] | list[float], config: GiGPOAdvantage) -> list[float]:
    scale = deviation(values) + config.epsilon if config.scale == "std" else 1.0
    return [(value - mean(values)) / scale for value in values]


def _by_turn(step: RewardBatch, values: list[Float64]) -> list[Float64]:
    """The value of its turn at each token of each trajectory."""
    return [of_turns[trajectory(part)[2]] for part, of_turns in zip(step.parts, values, strict=True)]
