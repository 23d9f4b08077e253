"""The scheduler: which groups are in play while the trainer trains, and which of them a step is trained on.

Staleness is a number. With `max_staleness: 0` nothing is in play but what the next step needs, and a step is played by
the weights that it trains. With K, so many groups more are in play that a step finds its own played already, by weights
that are K steps old at most. The rule is AReaL's (arXiv 2505.24298, section 5.1), in groups:

    groups given to steps + groups in play <= (steps behind the engines' weights + 1 + K) * groups per step

States of a group:

    drawn -> in play -> complete -> given to a step
                |  ^        |-----> filtered, counted
          stale |  | retry  |-----> stale: dropped and counted, or played again
                v  |
              dropped, or again in play

All is done on one event loop. What was played stands in the journal, so that the groups that no step was trained on
need not be in a checkpoint: where the frontier stands is enough.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

from polyturn.agents.episode import Episode, Outcome
from polyturn.agents.policy import Policy
from polyturn.configs.schema.rollout import RolloutConfig
from polyturn.envs.tasks.curriculum import Curriculum
from polyturn.rollout.branching import Branching
from polyturn.rollout.collection import Collection, end_all
from polyturn.rollout.filters import Filter
from polyturn.rollout.groups import Group, Prompt, PromptCursor
from polyturn.rollout.order import GroupOrder, GroupUnderWay
from polyturn.rollout.player import Player, RolloutError

FILTERED_STEPS = 16
"""So many times the groups of a step may be filtered before it makes do with what it has."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Frontier:
    """Which prompts are done with: trained on, filtered, or dropped."""

    position: int = 0
    """All before it are."""
    ahead: tuple[int, ...] = ()
    """Those behind it that are, too, in order."""

    def is_done(self, position: int) -> bool:
        """Whether a prompt is done with."""
        return position < self.position or position in self.ahead

    def with_done(self, position: int) -> Frontier:
        """The frontier with one prompt more."""
        ahead = {*self.ahead, position}
        first = self.position
        while first in ahead:
            ahead.remove(first)
            first += 1
        return Frontier(position=first, ahead=tuple(sorted(ahead)))


@dataclass(frozen=True, kw_only=True, slots=True)
class StepGroups:
    """The groups of one step, and how they came about."""

    groups: tuple[Group, ...]
    """In the order in which their prompts were drawn."""
    wait_s: float
    """How long the trainer waited for them."""
    num_filtered: dict[str, int]
    """Groups that the filter took since the step before, by reason."""
    num_stale: int
    """Groups that were dropped since, or played anew, because they had become too old."""
    num_failed: dict[str, int] = field(default_factory=dict)
    """Attempts that failed since, of whatever groups, by their stop reasons."""
    gave_up: bool
    """Whether the filter took so many that the step makes do with fewer groups."""
    num_in_play: int
    """Groups that have begun and are left for later steps."""


_Judged = tuple[Group, str | None]
"""A group, and why the filter takes it."""


@dataclass(kw_only=True, slots=True, eq=False)
class _InPlay:
    """A group that no step has been given."""

    prompt: Prompt
    task: asyncio.Task[_Judged]
    begun_version: int | None = None
    """Of the engines' weights when its first episode began."""
    group: Group | None = None
    """Once it is complete."""
    oldest_version: int | None = None
    """The one behind the first tokens of its episodes, once it is complete."""


@dataclass(kw_only=True, slots=True)
class _Since:
    """What was counted since the last step."""

    filtered: Counter[str] = field(default_factory=Counter)
    num_stale: int = 0


class Scheduler:
    """Keeps groups in play, and gives each step its own. Used on one event loop; close it at the end."""

    def __init__(
        self,
        *,
        player: Player,
        policy: Policy,
        cursor: PromptCursor,
        config: RolloutConfig,
        order: GroupOrder,
        keep_group: Filter,
        num_steps: int,
        updates_per_step: int,
        branching: Branching | None = None,
        step: int = 0,
        version: int = 0,
        frontier: Frontier | None = None,
        finished: Callable[[Prompt], Sequence[Episode]] = lambda _: (),
        keep: Callable[[Episode], Awaitable[None]] | None = None,
        on_episode: Callable[[Episode], None] | None = None,
        stop: asyncio.Event | None = None,
    ) -> None:
        """
        Args:
            cursor: Draws prompts, by their positions.
            num_steps: Steps of the run: nothing is drawn for later ones.
            updates_per_step: By how much the policy version grows with a step.
            branching: See `Collection`.
            step: Steps that are finished.
            version: The policy version that trainer and engines have.
            finished: Attempts of a prompt that were made before; asked for when its group begins.
            keep: See `Collection`, as `on_episode` and `stop`.
        """
        self._config = config
        self._cursor = cursor
        self._order = order
        self._keep_group = keep_group
        self._num_steps = num_steps
        self._updates_per_step = updates_per_step
        self._finished = finished
        self._num_given = step
        self._engine_step = step
        self._version = self._engine_version = version
        self._frontier = frontier or Frontier()
        self._next = self._frontier.position
        self._in_play: dict[int, _InPlay] = {}
        """By position, in order."""
        self._since = _Since()
        self._fault: BaseException | None = None
        self._changed = asyncio.Event()
        self._collection = Collection(
            player=player,
            policy=policy,
            samples_per_prompt=config.samples_per_prompt,
            branching=branching,
            keep=keep,
            on_episode=on_episode,
            on_start=self._note_start,
            stop=stop,
        )
        self._player = player

    @property
    def frontier(self) -> Frontier:
        """Which prompts are done with."""
        return self._frontier

    @property
    def curriculum(self) -> Curriculum | None:
        """What draws the prompts by results, as it stands with the frontier; None where their order is fixed."""
        return self._cursor.curriculum

    @property
    def collection(self) -> Collection:
        """What is in play."""
        return self._collection

    async def take(self) -> StepGroups | None:
        """The groups of the next step, as soon as they are there; None when the stop was set before.

        Raises:
            RolloutError: all episodes of the step failed, or none ended for too long.
        """
        started = time.perf_counter()
        self._collection.count_anew()
        self._refill()
        watched = [
            asyncio.create_task(self._collection.stop.wait()),
            asyncio.create_task(self._collection.stall()),
        ]
        try:
            while (chosen := self._choose()) is None:
                if self._in_play and all(item.group is not None for item in self._in_play.values()):
                    raise RolloutError("rollout.order: it waits although every group in play is complete")
                self._changed.clear()
                changed = asyncio.create_task(self._changed.wait())
                await asyncio.wait({changed, *watched}, return_when=asyncio.FIRST_COMPLETED)
                changed.cancel()
                if self._fault is not None:
                    raise self._fault
                if watched[1].done():
                    watched[1].result()
                if watched[0].done():
                    return None
        finally:
            for task in watched:
                task.cancel()
            await asyncio.gather(*watched, return_exceptions=True)
        return self._give(chosen, time.perf_counter() - started)

    def advance(self, *, version: int, engine_step: int, engine_version: int) -> None:
        """A step is finished: drop what has become too old, and begin what may begin.

        Args:
            version: The policy version that the next step begins with.
            engine_step: The step after which the engines got the weights that they have.
            engine_version: The version of those.
        """
        self._version, self._engine_step, self._engine_version = version, engine_step, engine_version
        for item in list(self._in_play.values()):
            if self._age(item) > self._config.max_staleness:
                self._put_off(item)
        self._refill()
        self._changed.set()

    async def close(self, *, drain_s: float = 0.0) -> None:
        """Begin nothing more, give what is under way `drain_s` seconds to end, then cancel it."""
        self._collection.stop.set()
        under_way = [item.task for item in self._in_play.values()]
        if under_way and drain_s and self._collection.num_playing:
            await asyncio.wait(under_way, timeout=drain_s)
        await end_all(under_way)

    def _refill(self) -> None:
        """Begin as many groups as may be in play."""
        config = self._config
        steps = min(self._engine_step + 1 + config.max_staleness, self._num_steps)
        num_allowed = (steps - self._num_given) * config.prompts_per_step
        if num_allowed > 0:
            num_allowed += config.num_spare
        fresh: list[Prompt] = []
        while len(self._in_play) + len(fresh) < num_allowed and not self._collection.stop.is_set():
            if not self._frontier.is_done(self._next):
                fresh.append(self._cursor.at(self._next))
            self._next += 1
        self._player.prefetch(fresh)
        for prompt in fresh:
            self._begin(prompt, self._finished(prompt))

    def _begin(self, prompt: Prompt, finished: Sequence[Episode]) -> None:
        # What an earlier session played of it is as old as it was then.
        self._put_in_play(prompt, self._play(prompt, finished), begun_version=oldest_of(finished))

    def _put_in_play(
        self, prompt: Prompt, play: Coroutine[Any, Any, _Judged], *, begun_version: int | None = None
    ) -> None:
        item = _InPlay(prompt=prompt, task=asyncio.create_task(play), begun_version=begun_version)
        self._in_play[prompt.position] = item
        item.task.add_done_callback(lambda _: self._ended(item))

    async def _play(self, prompt: Prompt, finished: Sequence[Episode]) -> _Judged:
        group = await self._collection.begin(prompt, finished)
        return group, None if group.num_missing else self._keep_group(group)

    def _note_start(self, prompt: Prompt) -> None:
        item = self._in_play.get(prompt.position)
        if item is not None and item.begun_version is None:
            item.begun_version = self._engine_version

    def _ended(self, item: _InPlay) -> None:
        """A group is complete: keep it, or let the filter take it."""
        if item.task.cancelled() or self._in_play.get(item.prompt.position) is not item:
            return
        self._changed.set()
        fault = item.task.exception()
        if fault is not None:
            self._fault = self._fault or fault
            return
        group, reason = item.task.result()
        if reason is not None and not self._gave_up:
            self._since.filtered[reason] += 1
            self._leave(item, group)
            self._refill()
        elif not group.num_missing:
            item.group = group
            item.oldest_version = oldest_of(group.episodes)

    @property
    def _gave_up(self) -> bool:
        limit = self._config.max_filtered_per_step or FILTERED_STEPS * self._config.prompts_per_step
        return self._since.filtered.total() >= limit

    def _choose(self) -> list[_InPlay] | None:
        """The groups of the step; None to wait."""
        config = self._config
        for item in list(self._in_play.values()):
            if item.group is not None and self._age(item) > config.max_staleness:
                self._put_off(item)
        wanted = config.prompts_per_step
        items = list(self._in_play.values())
        if self._gave_up:
            return [item for item in items if item.group is not None][:wanted]
        due = self._due(items) if config.on_stale == "wait" else []
        if due is None:
            return None
        others = self._ordered([item for item in items if item not in due], wanted - len(due))
        if others is None:
            return None
        return sorted(due + others, key=lambda item: item.prompt.position)

    def _due(self, items: Sequence[_InPlay]) -> list[_InPlay] | None:
        """Groups that this step must be given, so that none becomes too old later; None: not all are complete.

        After this step, those that may still be given to any of the next n steps must fit into n steps, for every n.
        """
        due: list[_InPlay] = []
        per_step, most = self._config.prompts_per_step, self._config.max_staleness
        begun = [item for item in items if item.begun_version is not None or item.group is not None]
        for num_steps in range(most + 1):
            pressed = [item for item in begun if most - self._age(item) <= num_steps]
            num_missing = len(pressed) - num_steps * per_step - len(due)
            chosen = self._ordered([item for item in pressed if item not in due], max(0, num_missing))
            if chosen is None:
                return None
            due += chosen
        return due[:per_step]

    def _ordered(self, items: Sequence[_InPlay], num_groups: int) -> list[_InPlay] | None:
        """So many complete ones, by the order that the config names; None to wait."""
        if not num_groups:
            return []
        views = [
            GroupUnderWay(
                position=item.prompt.position, is_complete=item.group is not None, age=self._age(item)
            )
            for item in items
        ]
        positions = self._order(views, num_groups)
        return None if positions is None else self._at(positions, num_groups)

    def _at(self, positions: Sequence[int], num_groups: int) -> list[_InPlay]:
        """The groups that an order chose. Raises `RolloutError` where it chose what cannot be trained on."""
        found = [self._in_play.get(position) for position in positions]
        complete = [item for item in found if item is not None and item.group is not None]
        if len(complete) != num_groups or len(set(positions)) != num_groups:
            raise RolloutError(
                f"rollout.order: it gave the positions {list(positions)[:20]}, which are not those of {num_groups} "
                "complete groups"
            )
        return complete

    def _give(self, chosen: Sequence[_InPlay], wait_s: float) -> StepGroups:
        groups = tuple(item.group for item in chosen if item.group is not None)
        gave_up, since, self._since = self._gave_up, self._since, _Since()
        if groups and not any(group.episodes for group in groups) and not gave_up:
            raise RolloutError(f"every episode failed: {self._collection.why()}")
        for item in chosen:
            self._leave(item, item.group)
        self._num_given += 1
        self._refill()
        self._player.prefetch(self._cursor.peek_at(self._next, self._config.prompts_per_step))
        return StepGroups(
            groups=groups,
            wait_s=wait_s,
            num_filtered=dict(since.filtered),
            num_stale=since.num_stale,
            num_failed=self._collection.take_failures(),
            gave_up=gave_up,
            num_in_play=len(self._in_play),
        )

    def _put_off(self, item: _InPlay) -> None:
        """A group has become too old: it is played again, or done with."""
        self._since.num_stale += 1
        if self._config.on_stale == "drop":
            self._leave(item)
            return
        item.task.cancel()
        self._put_in_play(item.prompt, self._play_again(item.prompt, item.task))

    async def _play_again(self, prompt: Prompt, before: asyncio.Task[_Judged]) -> _Judged:
        await asyncio.wait([before])
        self._collection.void(prompt)
        return await self._play(prompt, ())

    def _leave(self, item: _InPlay, group: Group | None = None) -> None:
        """A group is done with; None: it was dropped."""
        self._cursor.observe(item.prompt, group.episodes if group is not None else ())
        del self._in_play[item.prompt.position]
        item.task.cancel()
        self._frontier = self._frontier.with_done(item.prompt.position)
        item.task.add_done_callback(lambda _: self._collection.forget(item.prompt))

    def _age(self, item: _InPlay) -> int:
        """How many steps the oldest token of a group is old in the next step; 0 for one that has not begun."""
        oldest = item.begun_version if item.oldest_version is None else item.oldest_version
        if oldest is None:
            return 0
        return max(0, -((oldest - self._version) // self._updates_per_step))


def oldest_of(episodes: Sequence[Episode]) -> int | None:
    """The policy version behind the first tokens of several, of those that did not fail."""
    found = (oldest_version(episode) for episode in episodes if episode.outcome is not Outcome.FAILED)
    return min((version for version in found if version is not None), default=None)


def oldest_version(episode: Episode) -> int | None:
    """The policy version behind an episode's first tokens; None where it has none."""
    versions: list[Any] = [
        segment.policy_versions[segment.sampled].min() for segment in episode.segments if segment.num_sampled
    ]
    return int(min(versions)) if versions else None
