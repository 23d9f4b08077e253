"""Advantage estimators: from the rewards of a step to what each of its tokens is worth."""

from polyturn.trainer.algorithms.advantages import groups, returns, turns
from polyturn.trainer.algorithms.advantages.types import Advantages, RewardBatch, RewardPart, TokenColumns

__all__ = ["Advantages", "RewardBatch", "RewardPart", "TokenColumns", "groups", "returns", "turns"]
