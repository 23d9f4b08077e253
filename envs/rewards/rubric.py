"""Rewards made of others: rubrics of weighted criteria, and rewards that see all episodes of a task at once."""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import Awaitable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

from polyturn.envs.faults import EnvironmentFault, describe
from polyturn.envs.hooks import current_task, is_interruption
from polyturn.envs.messages import EpisodeView, GroupReward, Reward, Score, as_score, is_async
from polyturn.envs.rewards.answers import normalise_answer
from polyturn.envs.rewards.rules import check_label
from polyturn.tools.plain import as_number
from polyturn.tools.threads import Escaped, GivenUp, PinnedThread, in_threads

MAX_LOST = 32
"""Calls of one part that may be under way although nobody waits for them any more."""


R = TypeVar("R")


@dataclass(frozen=True, kw_only=True, slots=True)
class Criterion(Generic[R]):
    """A reward with its name and weight among others."""

    name: str
    weight: float
    reward: R


GroupCriterion = Criterion[GroupReward]


class EnvironmentGrade:
    """The environment's own grade, as a part of something else."""

    uses_environment_grade = True

    def __call__(self, episode: EpisodeView) -> Score:
        return as_score(episode.reward_parts)


class Rubric:
    """The weighted sum of its parts' values. Each raw value is recorded: as `name`, or `name.inner` of a part that has
    parts itself.

    It is asynchronous where one of its parts is; those are awaited together.
    """

    def __init__(self, parts: Sequence[Criterion[Reward]]) -> None:
        """Raises `ValueError` where there are no parts, or two have one name."""
        names = [part.name for part in parts]
        if not parts:
            raise ValueError("a rubric needs at least one part")
        if len(set(names)) != len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"two parts of the rubric have the name {twice!r}")
        self.parts = tuple(parts)
        self._busy: list[tuple[PinnedThread, str]] = []
        self.uses_environment_grade = any(
            getattr(part.reward, "uses_environment_grade", False) for part in parts
        )
        self.is_async = any(is_async(part.reward) for part in parts)

    def __call__(self, episode: EpisodeView) -> Score | Awaitable[Score]:
        if self.is_async:
            return self._score_async(episode)
        return self._sum([part.reward(episode) for part in self.parts])

    def check_label(self, label: Any) -> None:
        """Raise `ValueError` for a label that one of the parts cannot grade against."""
        for part in self.parts:
            try:
                check_label(part.reward, label)
            except ValueError as error:
                raise ValueError(f"part {part.name!r}: {error}") from error

    async def _score_async(self, episode: EpisodeView) -> Score:
        waiting = []
        for part in self.parts:
            value = part.reward(episode) if is_async(part.reward) else self._in_thread(part, episode)
            waiting.append(value if inspect.isawaitable(value) else _done(value))
        values: list[Any] = await asyncio.gather(*waiting)
        return self._sum(values)

    async def _in_thread(self, part: Criterion[Reward], episode: EpisodeView) -> Any:
        """The value of a part that is not asynchronous: in a thread of its own, as it may be slow or never return."""
        self._busy = [(thread, name) for thread, name in self._busy if not thread.is_idle]
        num_lost = len([name for thread, name in self._busy if name == part.name and thread.still_running])
        if num_lost >= MAX_LOST:
            raise RuntimeError(
                f"{num_lost} calls of the part {part.name!r} never returned and hold their threads; give what it waits "
                "for a deadline of its own"
            )
        thread = PinnedThread("part of a rubric")
        self._busy.append((thread, part.name))
        try:
            return await thread(functools.partial(part.reward, episode), what=part.name)
        finally:
            thread.shutdown()

    def _sum(self, values: Sequence[Any]) -> Score:
        total, recorded = 0.0, {}
        for part, value in zip(self.parts, values, strict=True):
            try:
                score = as_score(value, name=part.name)
            except ValueError as error:
                raise ValueError(f"part {part.name!r}: {error}") from error
            total += part.weight * score.value
            recorded.update(named_parts(part.name, score, is_bare=not isinstance(value, dict | Score)))
        return Score(value=total, parts=recorded)


def named_parts(name: str, score: Score, *, is_bare: bool) -> dict[str, float]:
    """What is recorded of one part: its value, and with a dot what it is made of itself."""
    inner = {} if is_bare else {f"{name}.{key}": value for key, value in score.parts.items()}
    return {name: score.value, **inner}


async def _done(value: Any) -> Any:
    return value


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
    parts: Sequence[GroupCriterion],
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
    part: GroupCriterion, episodes: Sequence[EpisodeView], executor: Executor | None, timeout_s: float | None
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
    except EnvironmentFault as fault:
        raise fault.of(what) from fault.__cause__
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
