"""Dynamic sampling: which complete groups are worth training on, by name or by a plug-in."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol, cast

from polyturn.configs.schema.rollout import GroupFilter, MeanRange, NoFilter, NonzeroDeviation
from polyturn.envs.plugins import Signature, load_plugin
from polyturn.rollout.groups import Group

UNIFORM = "uniform"
"""Why groups are left out whose rewards do not differ."""


class Filter(Protocol):
    """Judges complete groups."""

    def __call__(self, group: Group) -> str | None:
        """Why a group is not trained on, in a word or two that metrics count it by; None: it is."""
        ...


SIGNATURE = Signature(
    what="group filter",
    arguments=("group",),
    text="def keep(group: Group) -> str | None",
    wrong_results=(bytes, float, int, bool),
)


def make_filter(section: GroupFilter) -> Filter:
    """The filter that the config names. Raises `ValueError` for a plug-in that cannot be called so."""
    if isinstance(section, NoFilter):
        return keep_all
    if isinstance(section, NonzeroDeviation):
        return DeviationFilter(section.min_spread, section.reward_part)
    if isinstance(section, MeanRange):
        return MeanFilter(section.low, section.high, section.reward_part)
    return cast(Filter, load_plugin(SIGNATURE, section.target, section.options))


def keep_all(group: Group) -> None:
    """No group is left out."""


@dataclass(frozen=True, slots=True)
class DeviationFilter:
    """Leaves groups out whose rewards do not differ: nothing can be learnt by comparing them."""

    min_spread: float
    reward_part: str | None

    def __call__(self, group: Group) -> str | None:
        rewards = rewards_of(group, self.reward_part)
        return None if rewards and max(rewards) - min(rewards) > self.min_spread else UNIFORM


@dataclass(frozen=True, slots=True)
class MeanFilter:
    """Leaves groups out whose task is too hard or too easy."""

    low: float
    high: float
    reward_part: str | None

    def __call__(self, group: Group) -> str | None:
        rewards = rewards_of(group, self.reward_part)
        if not rewards:
            return "empty"
        mean = math.fsum(rewards) / len(rewards)
        if mean < self.low:
            return "too_hard"
        return "too_easy" if mean > self.high else None


def rewards_of(group: Group, part: str | None) -> list[float]:
    """The rewards of a group's episodes, or one part of them; 0 where an episode does not have the part."""
    if part is None:
        return [episode.reward for episode in group.episodes if episode.reward is not None]
    return [episode.reward_parts.get(part, 0.0) for episode in group.episodes]
