"""Rewards that see all episodes of a task at once."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from typing import Any

from polyturn.envs.faults import EnvironmentFault, describe
from polyturn.envs.hooks import current_task, in_threads, is_interruption
from polyturn.envs.rewards.rubric import named_parts
from polyturn.envs.rewards.text import normalise_answer
from polyturn.envs.rewards.types import EpisodeView, GroupReward, Score, as_score, is_async
from polyturn.tools.plain import as_number
from polyturn.tools.threads import Escaped, GivenUp, PinnedThread


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupPart:
    """A group reward with its name and weight."""

    name: str
    weight: float
    reward: GroupReward


def rank(episodes: Sequence[EpisodeView], *, by: str = "reward") -> list[float]:
    """Where each episode stands in its group: 1 the best, 0 the worst, ties share the mean of their places.

    `by`: `reward`, or the name of a part or of a metric; an episode without it counts as the lowest.
    """
    values = [_value(episode, by) for episode in episodes]
    if len(values) < 2:
        return [0.5] * len(values)
    below = [sum(other < value for other in values) for value in values]
    equal = [sum(other == value for other in values) - 1 for value in values]
    return [(b + e / 2) / (len(values) - 1) for b, e in zip(below, equal, strict=True)]


def diversity(episodes: Sequence[EpisodeView]) -> list[float]:
    """The share of the group's other episodes that gave another answer, after normalisation."""
    answers = [normalise_answer(episode.answer) for episode in episodes]
    if len(answers) < 2:
        return [0.0] * len(answers)
    return [sum(other != answer for other in answers) / (len(answers) - 1) for answer in answers]


BUILTIN: Mapping[str, Any] = {"rank": rank, "diversity": diversity}


def _value(episode: EpisodeView, by: str) -> float:
    if by == "reward":
        return episode.reward if episode.reward is not None else float("-inf")
    return {**episode.metrics, **episode.reward_parts}.get(by, float("-inf"))


async def score_group(
    parts: Sequence[GroupPart],
    episodes: Sequence[EpisodeView],
    *,
    executor: Executor | None = None,
    timeout_s: float | None = None,
) -> list[Score]:
    """What all group rewards add to each episode: the weighted sum, and the raw values.

    Raises:
        EnvironmentFault: one of them raised something, did not return one finite value for each episode, or took
            longer than `timeout_s`.
    """
    totals = [0.0] * len(episodes)
    recorded: list[dict[str, float]] = [{} for _ in episodes]
    for part in parts:
        values = await _call(part, episodes, executor, timeout_s)
        for index, value in enumerate(values):
            try:
                score = as_score(value, name=part.name)
            except ValueError as error:
                raise EnvironmentFault(f"group reward {part.name!r}: {error}") from error
            totals[index] += part.weight * score.value
            recorded[index].update(
                named_parts(part.name, score, is_bare=not isinstance(value, Mapping | Score))
            )
    try:
        return [
            Score(value=as_number(total), parts=of_one)
            for total, of_one in zip(totals, recorded, strict=True)
        ]
    except ValueError as error:
        raise EnvironmentFault(f"the group rewards with their weights: {error}") from error


async def _call(
    part: GroupPart, episodes: Sequence[EpisodeView], executor: Executor | None, timeout_s: float | None
) -> list[Any]:
    offload = in_threads(executor or PinnedThread("group reward"))
    what, own_task, deadline = f"group reward {part.name!r}", current_task(), asyncio.timeout(timeout_s)
    try:
        if is_async(part.reward):
            values: Any = part.reward(episodes)
        else:
            values = await offload(partial(part.reward, episodes), timeout_s=timeout_s, what=what)
        if inspect.isawaitable(values):
            async with deadline:
                values = await values
    except EnvironmentFault:
        raise
    except BaseException as error:
        if is_interruption(error, own_task):
            raise
        if isinstance(error, GivenUp) or deadline.expired():
            raise EnvironmentFault(f"{what} did not end within {timeout_s:g} s") from None
        raised = error.error if isinstance(error, Escaped) else error
        raise EnvironmentFault(f"{what}: {describe(raised)}") from raised
    if isinstance(values, Mapping | str) or not hasattr(values, "__len__") or len(values) != len(episodes):
        raise EnvironmentFault(
            f"group reward {part.name!r} must return one value for each of {len(episodes)} episodes, "
            f"not {values!r:.100}"
        )
    return list(values)
