"""Engines as one policy: an episode stays where its KV is, unless that engine is overloaded or gone."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from polyturn.agents.live_episodes import LiveEpisodes
from polyturn.agents.policy import EngineUnavailable, Generation, SamplingParams, TokenPolicy
from polyturn.tools.retries import Retries, Tries

FIRST_ABSENCE_S, LONGEST_ABSENCE_S = 2.0, 60.0
"""For so long nothing is sent to an engine that is gone; the time doubles while it stays away."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Overload:
    """When an episode leaves its engine: requests under way there > `ratio` x the fewest of any engine + `margin`."""

    ratio: float = 1.5
    margin: int = 16

    def of(self, num_requests: int, fewest: int) -> bool:
        """Whether an engine with `num_requests` is overloaded while another has `fewest`."""
        return num_requests > self.ratio * fewest + self.margin


UNKNOWN = -1
"""In place of a policy version."""
CROWD = Overload(ratio=1.25, margin=4)
"""How many more episodes an engine may have than the one with the fewest, for the sake of a prompt that it knows."""


@dataclass(kw_only=True, slots=True)
class Traffic:
    """What was answered: so far, or between two times."""

    num_requests: int = 0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_known_tokens: int = 0
    """Of the prompts' tokens those whose KV this engine has had, under the same weights, for the same episode."""
    num_lost_tokens: int = 0
    """Those of them that it had to compute again."""
    num_retractions: int = 0
    """How often requests lost their place in a batch while the weights were the same: for want of KV."""
    num_arrivals: int = 0
    """Episodes that came from another engine."""
    num_faults: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(**{name: getattr(self, name) + getattr(other, name) for name in self.__slots__})

    def __sub__(self, earlier: Traffic) -> Traffic:
        return Traffic(**{name: getattr(self, name) - getattr(earlier, name) for name in self.__slots__})

    def figures(self) -> dict[str, float]:
        """By name: counts, the share of prompt tokens that were cached, the share of known ones that were lost."""
        return {
            "requests": float(self.num_requests),
            "cache_hit_rate": self.num_cached_tokens / max(1, self.num_prompt_tokens),
            "cache_loss_rate": self.num_lost_tokens / max(1, self.num_known_tokens),
            "retractions": float(self.num_retractions),
            "arrivals": float(self.num_arrivals),
            "faults": float(self.num_faults),
        }


@dataclass(eq=False, kw_only=True, slots=True)
class _Engine:
    policy: TokenPolicy
    num_episodes: int = 0
    """That have their place here."""
    num_requests: int = 0
    """Under way."""
    away_until: float = 0.0
    absence_s: float = FIRST_ABSENCE_S
    traffic: Traffic = field(default_factory=Traffic)

    def leave(self, now: float) -> None:
        """It is gone."""
        self.away_until = now + self.absence_s
        self.absence_s = min(2 * self.absence_s, LONGEST_ABSENCE_S)

    def come_back(self) -> None:
        """It answers."""
        self.away_until, self.absence_s = 0.0, FIRST_ABSENCE_S


class EngineFleet:
    """One policy of several; `for_episode` gives each episode a place.

    With `sticky` an episode is placed at its first request, on the engine where another one began with the same prompt
    (its KV is there), or else on the one with the fewest episodes. It moves when that engine is overloaded or gone,
    with all its tokens, and stays where it came to: an engine that is back has no KV of it any more. Without `sticky`
    every request goes to the engine with the fewest under way.

    A request that an engine does not answer goes to each other engine at once, then to all of them again after a wait.
    One event loop only.
    """

    def __init__(
        self,
        policies: Sequence[TokenPolicy],
        *,
        sticky: bool = True,
        overload: Overload | None = None,
        live: LiveEpisodes | None = None,
        retries: Retries | None = None,
        chat_urls: Sequence[str] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            policies: One an engine, which make no retries of their own.
            live: Which episodes may ask; None: all.
            chat_urls: Where the engines answer chat requests, up to and with `/v1`.
        """
        assert policies, "at least one engine"
        self.live = live
        self.chat_urls = tuple(chat_urls)
        self._engines = [_Engine(policy=policy) for policy in policies]
        self._sticky = sticky
        self._overload = overload or Overload()
        self._retries = retries or Retries()
        self._clock = clock
        self._siblings: dict[int, Counter[_Engine]] = {}
        """By a hash of the prompt that they began with, where how many episodes began that have not ended."""

    @contextmanager
    def for_episode(self) -> Iterator[TokenPolicy]:
        """The policy of one episode, whose place is free again at the end of the block."""
        place = _Place(self)
        try:
            yield place
        finally:
            place.leave()

    async def generate(self, *, prompt_ids: npt.NDArray[np.int32], sampling: SamplingParams) -> Generation:
        """Sample a continuation for nobody in particular. Raises as an episode's policy does."""
        with self.for_episode() as policy:
            return await policy.generate(prompt_ids=prompt_ids, sampling=sampling)

    def set_present(self, index: int, present: bool) -> None:
        """What somebody else knows of an engine: whether it answers."""
        if present:
            self._engines[index].come_back()
        else:
            self._engines[index].leave(self._clock())

    @property
    def num_requests(self) -> list[int]:
        """Under way, by engine."""
        return [engine.num_requests for engine in self._engines]

    @property
    def num_episodes(self) -> list[int]:
        """That have their place there, by engine."""
        return [engine.num_episodes for engine in self._engines]

    @property
    def traffic(self) -> list[Traffic]:
        """By engine, what was answered so far."""
        return [replace(engine.traffic) for engine in self._engines]

    async def _ask(
        self, place: _Place, prompt_ids: npt.NDArray[np.int32], sampling: SamplingParams
    ) -> Generation:
        tries, failed = Tries(self._retries), list[_Engine]()
        while True:
            engine = self._choose(place, prompt_ids, failed)
            place.move(engine)
            wait_s: float | None = 0.0
            try:
                return await self._ask_one(engine, prompt_ids, sampling)
            except EngineUnavailable as fault:
                failed.append(engine)
                if len(failed) == len(self._engines):
                    failed.clear()
                    wait_s = tries.next_wait_s()
                if wait_s is None:
                    message = f"{tries.over('no engine answers')}: {fault}"
                    raise EngineUnavailable(message, is_gone=fault.is_gone) from fault
            if wait_s:
                await asyncio.sleep(wait_s)

    async def _ask_one(
        self, engine: _Engine, prompt_ids: npt.NDArray[np.int32], sampling: SamplingParams
    ) -> Generation:
        engine.num_requests += 1
        try:
            generation = await engine.policy.generate(prompt_ids=prompt_ids, sampling=sampling)
        except EngineUnavailable as fault:
            engine.traffic.num_faults += 1
            if fault.is_gone:
                engine.leave(self._clock())
            raise
        finally:
            engine.num_requests -= 1
        engine.come_back()
        return generation

    def _choose(self, place: _Place, prompt_ids: npt.NDArray[np.int32], failed: Sequence[_Engine]) -> _Engine:
        """Where a request goes: never to those in `failed`, and to one that is gone only where there is no other."""
        now = self._clock()
        asked = [engine for engine in self._engines if engine not in failed]
        present = [engine for engine in asked if engine.away_until <= now] or asked
        least = min(present, key=lambda engine: engine.num_requests)
        if not self._sticky:
            return least
        if place.engine is None:
            return self._choose_first(place, prompt_ids, present)
        if place.engine not in present:
            return min(present, key=lambda engine: (engine.num_episodes, engine.num_requests))
        is_overloaded = self._overload.of(place.engine.num_requests, least.num_requests)
        return least if is_overloaded else place.engine

    def _choose_first(
        self, place: _Place, prompt_ids: npt.NDArray[np.int32], present: Sequence[_Engine]
    ) -> _Engine:
        """Where an episode begins."""
        place.prompt = hash(np.asarray(prompt_ids, dtype=np.int32).tobytes())
        least = min(present, key=lambda engine: (engine.num_episodes, engine.num_requests))
        for engine in self._siblings.get(place.prompt, ()):
            if engine in present and not CROWD.of(engine.num_episodes + 1, least.num_episodes):
                return engine
        return least

    def _begin(self, prompt: int, engine: _Engine) -> None:
        """An episode with that prompt begins there."""
        self._siblings.setdefault(prompt, Counter())[engine] += 1

    def _end(self, prompt: int, engine: _Engine) -> None:
        """An episode with that prompt, which began there, has ended."""
        homes = self._siblings[prompt]
        homes[engine] -= 1
        if not homes[engine]:
            del homes[engine]
        if not homes:
            del self._siblings[prompt]


class _Place:
    """Where one episode is played."""

    __slots__ = ("_began", "_fleet", "_num_known", "_version", "engine", "prompt")

    def __init__(self, fleet: EngineFleet) -> None:
        self._fleet = fleet
        self.engine: _Engine | None = None
        self.prompt = 0
        """A hash of what the episode began with."""
        self._began: _Engine | None = None
        self._num_known = 0
        self._version = UNKNOWN

    def move(self, engine: _Engine) -> None:
        """Take the place of the episode to an engine."""
        if engine is self.engine:
            return
        if self.engine is None:
            self._began = engine
            self._fleet._begin(self.prompt, engine)
        else:
            self.engine.num_episodes -= 1
            self._num_known = 0
            engine.traffic.num_arrivals += 1
        engine.num_episodes += 1
        self.engine = engine

    def leave(self) -> None:
        """The episode has ended."""
        if self.engine is not None and self._began is not None:
            self.engine.num_episodes -= 1
            self._fleet._end(self.prompt, self._began)

    async def generate(self, *, prompt_ids: npt.NDArray[np.int32], sampling: SamplingParams) -> Generation:
        """Sample a continuation. Raises `PolicyFault` when a request is refused, or every engine fails."""
        generation = await self._fleet._ask(self, prompt_ids, sampling)
        assert self.engine is not None
        self._count(self.engine.traffic, len(prompt_ids), generation)
        return generation

    def _count(self, traffic: Traffic, num_prompt: int, generation: Generation) -> None:
        keeps_prompts = traffic.num_cached_tokens > 0
        traffic.num_requests += 1
        traffic.num_prompt_tokens += num_prompt
        traffic.num_cached_tokens += generation.num_cached_tokens
        if not len(generation):
            return
        first, last = int(generation.policy_versions[0]), int(generation.policy_versions[-1])
        # An engine that samples with seeds keeps no KV of prompts, and loses none.
        if keeps_prompts and first == self._version and num_prompt >= self._num_known:
            traffic.num_known_tokens += self._num_known
            traffic.num_lost_tokens += max(0, self._num_known - generation.num_cached_tokens)
        if first == last and self._version in (last, UNKNOWN):
            traffic.num_retractions += generation.num_retractions
        # The last token that was sampled has no KV yet.
        self._num_known, self._version = num_prompt + len(generation) - 1, last


def fleet_figures(traffic: Sequence[Traffic]) -> Mapping[str, float]:
    """Metrics of a step: `engine/cache_hit_rate` ... over all engines, and `engine/0/cache_hit_rate` ... of each."""
    row = {f"engine/{name}": value for name, value in sum(traffic, Traffic()).figures().items()}
    if len(traffic) > 1:
        for index, one in enumerate(traffic):
            row |= {f"engine/{index}/{name}": value for name, value in one.figures().items()}
    return row
