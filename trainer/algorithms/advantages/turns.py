"""Credit for single turns: from the rewards of turns, and from comparing steps that were taken in equal states."""

from __future__ import annotations

import numpy as np

from polyturn.configs.schema.algorithm import GiGPOAdvantage, TurnAdvantage
from polyturn.trainer.algorithms.advantages.comparison import (
    Group,
    by_group,
    by_outcome,
    deviation,
    mean,
    outcomes,
    spread,
    telling_rewards,
)
from polyturn.trainer.algorithms.advantages.finish import finish
from polyturn.trainer.algorithms.advantages.returns import discounted_sums
from polyturn.trainer.algorithms.advantages.types import (
    Advantages,
    Float64,
    RewardBatch,
    RewardPart,
    trajectory,
)
from polyturn.trainer.algorithms.registry import ADVANTAGES


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
