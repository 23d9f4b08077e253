"""Reward post-processing of one's own: a price for tokens, as a class that is made with its options."""

from __future__ import annotations

from collections.abc import Sequence

from polyturn.trainer.algorithms.advantages import RewardPart


class TokenPrice:
    """Takes `per_thousand` off the reward for every thousand sampled tokens, of episodes that earned `above` or more.

    What failed pays nothing: otherwise giving up early would be the cheapest way to fail.
    """

    def __init__(self, *, per_thousand: float = 0.1, above: float = 0.5) -> None:
        if per_thousand < 0:
            raise ValueError(f"per_thousand is {per_thousand}; a price is not negative")
        self.per_thousand = per_thousand
        self.above = above

    def __call__(self, rewards: Sequence[float], parts: Sequence[RewardPart]) -> Sequence[float]:
        return [
            reward - self.per_thousand * part.num_trainable / 1000 if reward >= self.above else reward
            for reward, part in zip(rewards, parts, strict=True)
        ]
