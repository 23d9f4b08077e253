"""Engines as one policy: an episode stays where its KV is, unless that engine is overloaded or gone.

Engines come and go: what they are at a moment is said by `set_engines`.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from polyturn.agents.live_episodes import LiveEpisodes
from polyturn.agents.policy import (
    EngineUnavailable,
    GarbledAnswer,
    Generation,
    SamplingParams,
    TokenPolicy,
)
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
    num_garbled: int = 0
    """Of the faults, answers that made no sense."""
    num_sampled_tokens: int = 0
    answer_s: float = 0.0
    """Of all answers, from the request on."""
    num_cut_off: int = 0
    """Requests that were under way at an engine when it went, or found it gone."""
    num_cut_off_tokens: float = 0.0
    """What it had sampled for them and told nobody: an estimate, by the time that they had and its pace."""
    num_recomputed_tokens: int = 0
    """Of episodes that came from another engine, what was computed again at their first request here."""

    @property
    def token_s(self) -> float:
        """Seconds for which a request waits for each of its tokens; 0 where none was sampled."""
        return self.answer_s / self.num_sampled_tokens if self.num_sampled_tokens else 0.0

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
            "garbled": float(self.num_garbled),
            "token_seconds": self.token_s,
            "cut_off": float(self.num_cut_off),
            "cut_off_tokens": self.num_cut_off_tokens,
            "recomputed_tokens": float(self.num_recomputed_tokens),
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Ailment:
    """An engine that failed request after request."""

    num_faults: int
    """In a row."""
    num_garbled: int
    """Of them, answers that made no sense."""
    last: str
    """What was the matter the last time."""


@dataclass(eq=False, kw_only=True, slots=True)
class _Engine:
    number: int
    policy: TokenPolicy
    traffic: Traffic
    num_episodes: int = 0
    """That have their place here."""
    num_requests: int = 0
    """Under way."""
    away_until: float = 0.0
    absence_s: float = FIRST_ABSENCE_S
    is_leaving: bool = False
    """What is under way ends here, and nothing more begins."""
    ailment: Ailment | None = None
    under_way: set[asyncio.Timeout] = field(default_factory=set)
    """The deadlines of requests, by which they can be cut off."""

    def note_fault(self, fault: EngineUnavailable) -> None:
        """It did not answer a request, or not with sense."""
        before, is_garbled = self.ailment, isinstance(fault, GarbledAnswer)
        self.traffic.num_faults += 1
        self.traffic.num_garbled += is_garbled
        self.ailment = Ailment(
            num_faults=1 if before is None else before.num_faults + 1,
            num_garbled=is_garbled + (0 if before is None else before.num_garbled),
            last=str(fault),
        )

    def cut_off(self) -> None:
        """It is there no more: who waits for it is not to wait any longer."""
        now = asyncio.get_running_loop().time()
        for deadline in self.under_way:
            deadline.reschedule(now)

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
    Where there is no engine at all it waits for one. Engines have numbers, from 0 on, which are never given again but
    to what replaces one. One event loop only.
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
            policies: One an engine, which make no retries of their own; the first has number 0.
            live: Which episodes may ask; None: all.
            chat_urls: Where the engines answer chat requests, up to and with `/v1`.
        """
        assert policies, "at least one engine"
        self.live = live
        self.chat_urls = tuple(chat_urls)
        self._traffic = {number: Traffic() for number in range(len(policies))}
        """By the numbers of all engines that there ever were."""
        self._engines = {
            number: _Engine(number=number, policy=policy, traffic=self._traffic[number])
            for number, policy in enumerate(policies)
        }
        self._changed = asyncio.Event()
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

    def set_engines(self, policies: Mapping[int, TokenPolicy], *, leaving: Collection[int] = ()) -> None:
        """Say which engines there are, by their numbers. A policy that is the same as before is the same engine.

        Requests under way at an engine that is there no more are cut off, and go to others at once.

        Args:
            leaving: Those of them that nothing is to begin at any more.
        """
        before = self._engines
        self._engines = {}
        for number, policy in sorted(policies.items()):
            engine = before.get(number)
            if engine is None or engine.policy is not policy:
                traffic = self._traffic.setdefault(number, Traffic())
                engine = _Engine(number=number, policy=policy, traffic=traffic)
            engine.is_leaving = number in leaving
            self._engines[number] = engine
        for engine in before.values():
            if self._engines.get(engine.number) is not engine:
                engine.cut_off()
        self._changed.set()
        self._changed = asyncio.Event()

    def set_present(self, number: int, present: bool) -> None:
        """What somebody else knows of an engine: whether it answers."""
        engine = self._engines.get(number)
        if engine is None:
            return
        if present:
            engine.come_back()
        else:
            engine.leave(self._clock())

    @property
    def policies(self) -> list[TokenPolicy]:
        """Of the engines that are there, by their numbers."""
        return [engine.policy for engine in self._engines.values()]

    @property
    def num_requests(self) -> dict[int, int]:
        """Under way, by engine."""
        return {number: engine.num_requests for number, engine in self._engines.items()}

    @property
    def num_episodes(self) -> dict[int, int]:
        """That have their place there, by engine."""
        return {number: engine.num_episodes for number, engine in self._engines.items()}

    @property
    def traffic(self) -> dict[int, Traffic]:
        """By engine, what was answered so far; of those, too, that are there no more."""
        return {number: replace(traffic) for number, traffic in self._traffic.items()}

    @property
    def ailments(self) -> dict[int, Ailment]:
        """By engine, what is the matter with those that failed their last request."""
        return {
            number: engine.ailment for number, engine in self._engines.items() if engine.ailment is not None
        }

    async def _ask(
        self, place: _Place, prompt_ids: npt.NDArray[np.int32], sampling: SamplingParams
    ) -> Generation:
        tries, failed, first_asked = Tries(self._retries), set[_Engine](), self._clock()
        fault: EngineUnavailable | None = None
        while True:
            staying = [engine for engine in self._engines.values() if not engine.is_leaving]
            if not staying:
                await self._wait_for_one(tries)
                continue
            asked = [engine for engine in staying if engine not in failed]
            if not asked:
                assert fault is not None, "nobody fails who was not asked"
                failed.clear()
                wait_s = tries.next_wait_s()
                if wait_s is None:
                    message = f"{tries.over('no engine answers')}: {fault}"
                    raise EngineUnavailable(message, is_gone=fault.is_gone) from fault
                await asyncio.sleep(wait_s)
                continue
            engine = self._choose(place, prompt_ids, asked)
            place.move(engine)
            waited_s = self._clock() - first_asked
            try:
                generation = await self._ask_one(engine, prompt_ids, sampling)
            except EngineUnavailable as error:
                failed.add(engine)
                fault = error
            else:
                return replace(generation, waited_s=waited_s) if fault is not None else generation

    async def _wait_for_one(self, tries: Tries) -> None:
        """Wait until other engines are there. Raises `EngineUnavailable` when none came in time."""
        try:
            async with asyncio.timeout(tries.left_s):
                await self._changed.wait()
        except TimeoutError as error:
            raise EngineUnavailable("there is no engine, and none came in time", is_gone=True) from error

    async def _ask_one(
        self, engine: _Engine, prompt_ids: npt.NDArray[np.int32], sampling: SamplingParams
    ) -> Generation:
        asked = self._clock()
        engine.num_requests += 1
        try:
            generation = await self._ask_until_cut_off(engine, prompt_ids, sampling)
        except EngineUnavailable as fault:
            engine.note_fault(fault)
            if fault.is_gone:
                engine.leave(self._clock())
                self._note_cut_off(engine.traffic, self._clock() - asked, sampling)
            raise
        finally:
            engine.num_requests -= 1
        engine.come_back()
        engine.ailment = None
        engine.traffic.num_sampled_tokens += len(generation)
        engine.traffic.answer_s += self._clock() - asked
        return generation

    async def _ask_until_cut_off(
        self, engine: _Engine, prompt_ids: npt.NDArray[np.int32], sampling: SamplingParams
    ) -> Generation:
        deadline = asyncio.timeout(None)
        try:
            async with deadline:
                engine.under_way.add(deadline)
                try:
                    return await engine.policy.generate(prompt_ids=prompt_ids, sampling=sampling)
                finally:
                    engine.under_way.discard(deadline)
        except TimeoutError as error:
            if not deadline.expired():
                raise
            raise EngineUnavailable("the engine was taken out with the request", is_gone=True) from error

    def _note_cut_off(self, traffic: Traffic, seconds: float, sampling: SamplingParams) -> None:
        """A request was under way for so long at an engine that went."""
        traffic.num_cut_off += 1
        if traffic.token_s:
            traffic.num_cut_off_tokens += min(seconds / traffic.token_s, float(sampling.max_tokens))

    def _choose(self, place: _Place, prompt_ids: npt.NDArray[np.int32], asked: Sequence[_Engine]) -> _Engine:
        """Which of `asked` a request goes to: to one that is gone only where there is no other."""
        now = self._clock()
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

    __slots__ = ("_began", "_fleet", "_has_moved", "_num_known", "_version", "engine", "prompt")

    def __init__(self, fleet: EngineFleet) -> None:
        self._fleet = fleet
        self.engine: _Engine | None = None
        self.prompt = 0
        """A hash of what the episode began with."""
        self._began: _Engine | None = None
        self._has_moved = False
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
            self._num_known, self._has_moved = 0, True
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
        if self._has_moved:
            traffic.num_recomputed_tokens += max(0, num_prompt - generation.num_cached_tokens)
            self._has_moved = False
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


def fleet_figures(traffic: Mapping[int, Traffic]) -> Mapping[str, float]:
    """Metrics of a step: `engine/cache_hit_rate` ... over all engines, and `engine/0/cache_hit_rate` ... of each that
    was asked."""
    row = {f"engine/{name}": value for name, value in sum(traffic.values(), Traffic()).figures().items()}
    if len(traffic) > 1:
        for number, one in traffic.items():
            if one.num_requests or one.num_faults:
                row |= {f"engine/{number}/{name}": value for name, value in one.figures().items()}
    return row
