"""Rewards: rules by name, functions of one's own, services, rubrics, and what environments share."""

from polyturn.envs.rewards.answers import contains, exact_match, f1, normalise_answer
from polyturn.envs.rewards.types import EpisodeView, GroupReward, Reward, Score

__all__ = [
    "EpisodeView",
    "GroupReward",
    "Reward",
    "Score",
    "contains",
    "exact_match",
    "f1",
    "normalise_answer",
]
