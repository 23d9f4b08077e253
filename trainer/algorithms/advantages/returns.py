"""Token by token: returns and generalised advantages along the sampled tokens.

Observations are no part of a trajectory, so nothing ends, discounts or bootstraps at them: deleting them changes
nothing. An episode that a limit ended is worth nothing beyond its end, like any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from polyturn.configs.schema.algorithm import (
    GAEAdvantage,
    ReinforcePlusPlusAdvantage,
    ReinforcePlusPlusBaselineAdvantage,
)
from polyturn.trainer.algorithms.advantages.comparison import (
    Group,
    by_group,
    mean,
    outcomes,
    telling_rewards,
)
from polyturn.trainer.algorithms.advantages.finish import finish
from polyturn.trainer.algorithms.advantages.types import (
    Advantages,
    Float64,
    RewardBatch,
    RewardPart,
    along,
    back,
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
