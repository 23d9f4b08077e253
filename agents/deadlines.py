"""Limits of an episode, and whose time it is: only what the policy takes can truncate it; all else has deadlines."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TypeVar

from polyturn.agents.live_episodes import LiveEpisodes
from polyturn.agents.policy import NoSlot, PolicyFault
from polyturn.envs.faults import EnvironmentFault
from polyturn.tools.tool import MAX_RESULT_CHARS

Value = TypeVar("Value")


@dataclass(frozen=True, kw_only=True, slots=True)
class EpisodeLimits:
    """Where an episode is truncated. Token limits do not apply to policies that speak in messages."""

    max_turns: int = 8
    max_tokens_per_turn: int = 256
    max_tokens_per_episode: int = 4096
    """Prompt, observations and answers together."""
    timeout_s: float = 600.0
    """Of the policy's own time: requests that were answered, and tool calls."""
    request_timeout_s: float | None = None
    """One request without an answer is a `PolicyFault` after so long. None: `timeout_s`."""
    interruption_timeout_s: float = 600.0
    """The engine may go on aborting one turn for so long; then that is a `PolicyFault`."""
    hook_timeout_s: float | None = None
    """Each hook of the environment is an `EnvironmentFault` after so long. None: `timeout_s`."""
    max_tool_calls_per_turn: int | None = 32
    """Further calls are answered by saying so. None: no limit."""
    max_tool_calls_per_episode: int | None = 256
    max_tool_result_chars: int | None = MAX_RESULT_CHARS
    """What the model is shown of a result, where the tool sets no limit of its own. None: all."""


def _set() -> asyncio.Event:
    event = asyncio.Event()
    event.set()
    return event


@dataclass(frozen=True, slots=True)
class Slots:
    """How many generation requests, and how many resets and steps of environments, run at once.

    A request's slot is held while the request is under way and never during tool time: an episode that waits for a
    tool leaves the engines to others.
    """

    requests: asyncio.Semaphore
    steps: asyncio.Semaphore
    timeout_s: float | None = None
    """How long an episode may wait for one; None: as long as it takes."""
    may_request: asyncio.Event = field(default_factory=_set)
    """Cleared while the engines rest: nobody's time runs then."""
    long_renders: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(1))
    """Of threads that tokenise long texts: several would keep the event loop from the interpreter."""


MAX_SPANS = 256
"""Waits of one episode that are kept with their times."""


@dataclass(kw_only=True, slots=True, eq=False)
class EpisodeTime:
    """The time of one episode, by its owner.

        policy           generation requests that were answered, and tool calls: at most `policy_s` together
        engine           one request without an answer: at most `request_timeout_s`, then a `PolicyFault`
        slots            waiting for one: at most `Slots.timeout_s`, then a fault of whatever it is a slot of
        environment      its hooks see to their own deadlines (`StepLimits`)

    A request that is not answered may be an engine that hangs, so it never counts as the policy's.
    """

    policy_s: float
    request_timeout_s: float
    slots: Slots | None = None
    live: LiveEpisodes | None = None
    """Those whose KV the engines hold, of which this one is to be; None: there may be any number."""
    spent_s: float = 0.0
    """What the policy took so far; requests that were under way at once count once."""
    _counted_until: float = 0.0
    _entering: asyncio.Lock = field(default_factory=asyncio.Lock)
    seconds: dict[str, float] = field(
        default_factory=lambda: {"generate_s": 0.0, "tools_s": 0.0, "queue_s": 0.0}
    )
    """As `EpisodeTimings`."""
    spans: list[tuple[str, float, float]] = field(default_factory=list)
    """As `EpisodeTimings`, by `time.perf_counter`."""
    num_drawn_tokens: int = 0
    """As `Episode.num_drawn_tokens`."""

    @classmethod
    def of(
        cls, limits: EpisodeLimits, slots: Slots | None, *, live: LiveEpisodes | None = None
    ) -> EpisodeTime:
        """The time of an episode that has not begun."""
        request_timeout_s = limits.request_timeout_s or limits.timeout_s
        return cls(policy_s=limits.timeout_s, request_timeout_s=request_timeout_s, slots=slots, live=live)

    @property
    def left_s(self) -> float:
        return max(0.0, self.policy_s - self.spent_s)

    @property
    def is_over(self) -> bool:
        return self.spent_s > self.policy_s

    async def request(
        self, ask: Callable[[], Awaitable[Value]], *, counts: Callable[[Value], bool] | None = None
    ) -> Value:
        """The policy's answer to one request, which waits for its slot first.

        Args:
            counts: Whether the time of an answer is the policy's; None: always.

        Raises:
            NoSlot: there was no slot in time.
            PolicyFault: there was no answer in time.
        """
        if self.slots is not None and not self.slots.may_request.is_set():
            asked = time.perf_counter()
            await self.slots.may_request.wait()
            self._note("queue", asked)
        if self.live is not None:
            async with self._entering:  # of requests that are made at once, one enters for all
                await self._wait(self.live.enter(self), NoSlot, "live episode")
        slot = self.slots.requests if self.slots is not None else None
        if slot is not None:
            await self._acquire(slot, NoSlot, "generation request")
        started = time.perf_counter()
        deadline = asyncio.timeout(self.request_timeout_s)
        try:
            async with deadline:
                answer = await ask()
        except TimeoutError as error:
            if not deadline.expired():
                raise
            raise PolicyFault(f"no answer within {self.request_timeout_s:g} s") from error
        finally:
            if slot is not None:
                slot.release()
            ended = self._note("generate", started)
        if counts is None or counts(answer):
            self.spent_s += max(0.0, ended - max(started, self._counted_until))
            self._counted_until = ended
        return answer

    def _note(self, kind: str, started: float) -> float:
        """Something has ended; when."""
        ended = time.perf_counter()
        self.seconds[f"{kind}_s"] += ended - started
        if len(self.spans) < MAX_SPANS:
            self.spans.append((kind, started, ended))
        return ended

    def take_back(self, seconds: float) -> None:
        """So much of what the last request took was no time of the policy, but of a queue."""
        self.spent_s = max(0.0, self.spent_s - seconds)
        self.seconds["generate_s"] = max(0.0, self.seconds["generate_s"] - seconds)
        self.seconds["queue_s"] += seconds

    def end(self) -> None:
        """The episode asks nothing more."""
        if self.live is not None:
            self.live.leave(self)

    async def environment(self, work: Callable[[], Awaitable[Value]]) -> Value:
        """What a reset or a step of the environment gives. Raises `EnvironmentFault` when there was no slot in time."""
        slot = self.slots.steps if self.slots is not None else None
        if slot is not None:
            await self._acquire(slot, EnvironmentFault, "step of an environment")
        started = time.perf_counter()
        try:
            return await work()
        finally:
            if slot is not None:
                slot.release()
            self._note("tools", started)

    async def _acquire(self, slot: asyncio.Semaphore, fault: type[RuntimeError], what: str) -> None:
        if slot.locked():
            await self._wait(slot.acquire(), fault, what)
        else:
            await slot.acquire()  # at once

    async def _wait(self, turn: Awaitable[object], fault: type[RuntimeError], what: str) -> None:
        """Wait for one's turn. Raises `fault` when it did not come in time."""
        timeout_s = self.slots.timeout_s if self.slots is not None else None
        asked = time.perf_counter()
        try:
            async with asyncio.timeout(timeout_s):
                await turn
        except TimeoutError:
            raise fault(f"no slot for a {what} became free within {timeout_s:g} s") from None
        finally:
            self._note("queue", asked)
