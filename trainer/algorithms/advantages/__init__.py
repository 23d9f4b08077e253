"""Advantage estimators: from the rewards of a step to what each of its tokens is worth."""

from polyturn.trainer.algorithms.advantages.groups import GroupAdvantages, group_advantages
from polyturn.trainer.algorithms.advantages.types import Advantages, RewardBatch, RewardPart, TokenColumns

__all__ = [
    "Advantages",
    "GroupAdvantages",
    "RewardBatch",
    "RewardPart",
    "TokenColumns",
    "group_advantages",
]
