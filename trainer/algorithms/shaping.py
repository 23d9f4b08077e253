"""What happens to rewards between the environment and the advantages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from polyturn.configs.schema.algorithm import OverlongShaping
from polyturn.trainer.algorithms.advantages import RewardBatch, RewardPart
from polyturn.trainer.algorithms.protocols import RewardPostprocessor
from polyturn.trainer.algorithms.registry import REWARD_POSTPROCESSORS


@REWARD_POSTPROCESSORS.register(
    "overlong",
    formula="r - factor * clip((length - (max_tokens - buffer)) / buffer, 0, 1)",
    paper="2503.14476",
    config=OverlongShaping,
    example={"max_tokens": 16, "buffer_tokens": 8},
)
def overlong(
    rewards: Sequence[float], parts: Sequence[RewardPart], config: OverlongShaping
) -> Sequence[float]:
    """DAPO's soft punishment: none until `buffer_tokens` before `max_tokens`, all of `factor` from there on.

    The length is the number of tokens that the policy sampled, over all turns.
    """
    start = config.max_tokens - config.buffer_tokens
    return [
        reward - config.factor * min(max((part.num_trainable - start) / config.buffer_tokens, 0.0), 1.0)
        for reward, part in zip(rewards, parts, strict=True)
    ]


def postprocess(step: RewardBatch, processor: RewardPostprocessor) -> RewardBatch:
    """The step with the rewards that the processor makes of it.

    What it adds or takes is paid at a part's last turn, so that the rewards of turns still add up. What the task paid
    is kept beside it, since that alone says whether the answers of a group differ.

    Raises:
        ValueError: it returned another number of rewards, or one that is not finite.
    """
    rewards = processor([part.reward for part in step.parts], step.parts)
    if len(rewards) != len(step.parts):
        raise ValueError(
            f"reward post-processing returned {len(rewards)} rewards for {len(step.parts)} episodes"
        )
    return RewardBatch(
        parts=tuple(
            _with_reward(part, float(reward)) for part, reward in zip(step.parts, rewards, strict=True)
        )
    )


def _with_reward(part: RewardPart, reward: float) -> RewardPart:
    if not math.isfinite(reward):
        raise ValueError(f"reward post-processing made the reward of {part.part_id!r} {reward}")
    turns = part.turn_rewards
    if turns:
        turns = (*turns[:-1], turns[-1] + reward - part.reward)
    return replace(part, reward=reward, turn_rewards=turns, unshaped=part.own)
