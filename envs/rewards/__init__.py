"""Rewards that environments share."""

from polyturn.envs.rewards.text import exact_match, normalise_answer

__all__ = ["exact_match", "normalise_answer"]
