"""Rubrics: weighted criteria, each recorded as it is."""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from typing import Any

from polyturn.envs.rewards.labels import check_label
from polyturn.envs.rewards.types import EpisodeView, Reward, Score, as_score, is_async
from polyturn.tools.threads import PinnedThread

MAX_LOST = 32
"""Calls of one part that may be under way although nobody waits for them any more."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One criterion of a rubric."""

    name: str
    weight: float
    reward: Reward


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

    def __init__(self, parts: Sequence[Part]) -> None:
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

    async def _in_thread(self, part: Part, episode: EpisodeView) -> Any:
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
