"""Rewards: rules by name, functions of one's own, services, rubrics, and what environments share."""

from polyturn.envs.rewards.answers import contains, exact_match, f1, normalise_answer

__all__ = [
    "contains",
    "exact_match",
    "f1",
    "normalise_answer",
]
