"""Environments that are made once and used again."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass
from functools import partial

from polyturn.envs.faults import EnvironmentFault
from polyturn.envs.messages import EnvironmentChoice
from polyturn.envs.played_env import PlayedEnv
from polyturn.tools.threads import GivenUp, PinnedThread

CLOSE_S = 30.0
"""How long an environment may take to close; at the end of the pool, all of them together."""
MAX_MAKING = 64
"""Environments that are made at once, each in a thread."""
QUICK_S = 0.01
"""What an environment takes of a processor that is made on the event loop the next time, where it needs no thread."""
QUICK_WALL_S = 0.25
"""And how long it may take on a machine that is busy with other things."""
FIRST_S = 2.0
"""How long the others of a kind wait for the first, which tells whether they can be made on the event loop."""


@dataclass(eq=False, frozen=True, slots=True)
class PooledEnvironment:
    """An environment and the thread that it is made and closed in.

    Where the environment needs one, all of it that is not asynchronous runs in that thread in between, too. Otherwise
    the thread is not there in between: 10,000 environments are no 10,000 threads.
    """

    env: PlayedEnv
    thread: PinnedThread

    @property
    def is_reusable(self) -> bool:
        """Whether another episode may be played in it: not while anything of it still runs."""
        return self.thread.is_idle and self.env.is_reusable

    @property
    def still_running(self) -> tuple[str, ...]:
        """What was given up in it and has not returned."""
        names = self.thread.still_running or self.env.still_running
        return tuple(f"{name} of {self.env.env_id}" for name in names)


class EnvironmentPool:
    """Environments that are made once and used again, and those that something still runs in.

    Used from one thread, that of the event loop.
    """

    def __init__(
        self,
        make_env: Callable[[], PlayedEnv],
        make_chosen: Callable[[EnvironmentChoice], PlayedEnv] | None = None,
        *,
        make_timeout_s: float | None = None,
    ) -> None:
        """`make_env` makes those of tasks that choose none; without `make_chosen` there are no others."""
        self._make_env = make_env
        self._make_chosen = make_chosen
        self._make_timeout_s = make_timeout_s
        self._idle: dict[str, list[PooledEnvironment]] = {}
        self._busy: list[PinnedThread | PooledEnvironment] = []
        self._closing: list[_Closing] = []
        self._making = asyncio.Semaphore(MAX_MAKING)
        self._first: dict[str, asyncio.Future[None]] = {}
        """Of each kind: done when its first environment is made, or could not be."""
        self._quickly_made: set[str] = set()
        """Kinds that need no thread, and whose latest environment was made in no time."""

    async def take(self, choice: EnvironmentChoice | None) -> PooledEnvironment:
        """An idle environment of the kind that a task chooses, or a new one.

        Raises:
            EnvironmentFault: it could not be made in time.
            Exception: what making it raises.
        """
        idle = self._idle.get(_key(choice))
        if idle:
            return idle.pop()
        key = _key(choice)
        first = self._first.get(key)
        if first is None:
            return await self._make_first(choice)
        if not first.done():
            await asyncio.wait((first,), timeout=FIRST_S)
        if key in self._quickly_made:
            return self._made_here(choice)
        async with self._making:
            if key in self._quickly_made:  # by now
                return self._made_here(choice)
            return await self._made(choice)

    async def _make_first(self, choice: EnvironmentChoice | None) -> PooledEnvironment:
        """The first of a kind, which tells how the others are made."""
        first = self._first[_key(choice)] = asyncio.get_running_loop().create_future()
        try:
            return await self._made(choice)
        finally:
            first.set_result(None)

    def _made_here(self, choice: EnvironmentChoice | None) -> PooledEnvironment:
        """One of a kind that is made in no time: where a thousand are made, threads would wait for each other."""
        env, is_quick = self._timed_make(choice)
        if not is_quick:
            self._quickly_made.discard(_key(choice))
        return PooledEnvironment(env, PinnedThread("environment"))

    async def _made(self, choice: EnvironmentChoice | None) -> PooledEnvironment:
        thread = PinnedThread("environment")
        what = "making an environment" if choice is None else f"making {choice.env_id}"
        try:
            env, is_quick = await thread(
                partial(self._timed_make, choice), timeout_s=self._make_timeout_s, what=what
            )
        except GivenUp:
            raise EnvironmentFault(f"{what} did not end within {self._make_timeout_s:g} s") from None
        finally:
            if not thread.is_idle:
                self._busy.append(thread)
        if env.needs_thread:
            env.keep_thread(thread)
        else:
            thread.shutdown()
            if is_quick:
                self._quickly_made.add(_key(choice))
        return PooledEnvironment(env, thread)

    def give_back(
        self, pooled: PooledEnvironment, choice: EnvironmentChoice | None, *, survived: bool
    ) -> None:
        """Keep an environment for the next who asks; close it where its episode failed or anything still runs."""
        if survived and pooled.is_reusable:
            self._idle.setdefault(_key(choice), []).append(pooled)
            return
        if not pooled.is_reusable:
            self._busy.append(pooled)
        self._close(pooled)

    @property
    def lost(self) -> Counter[str]:
        """What was given up and has not returned, by name: each holds a thread."""
        running = [(one, one.still_running) for one in self._busy]
        self._busy = [one for one, what in running if what]
        self._closing = [one for one in self._closing if not one.future.done()]
        late = [one.what for one in self._closing if time.monotonic() > one.started + CLOSE_S]
        return Counter([*late, *(name for _, what in running for name in what)])

    def watch(self, thread: PinnedThread) -> None:
        """Count what still runs in a thread that is nobody's any more."""
        thread.shutdown()
        if not thread.is_idle:
            self._busy.append(thread)

    def close(self) -> None:
        """Close the idle environments, each in its thread; one that does not close in time is left."""
        idle, self._idle = self._idle, {}
        for envs in idle.values():
            for pooled in envs:
                self._close(pooled)
        wait([one.future for one in self._closing], timeout=CLOSE_S)

    def _close(self, pooled: PooledEnvironment) -> None:
        what = f"close of {pooled.env.env_id}"
        self._closing.append(_Closing(pooled.thread.submit(_close, pooled), what, time.monotonic()))

    def _timed_make(self, choice: EnvironmentChoice | None) -> tuple[PlayedEnv, bool]:
        """An environment, and whether it was made in no time."""
        started, cpu_started = time.perf_counter(), time.thread_time()
        env = self._make(choice)
        took_s, cpu_s = time.perf_counter() - started, time.thread_time() - cpu_started
        return env, cpu_s < QUICK_S and took_s < QUICK_WALL_S

    def _make(self, choice: EnvironmentChoice | None) -> PlayedEnv:
        if choice is None:
            return self._make_env()
        if self._make_chosen is None:
            raise ValueError(
                f"a task asks for the environment {choice.env_id!r}, and only one kind is played here"
            )
        return self._make_chosen(choice)


def _close(pooled: PooledEnvironment) -> None:
    try:
        pooled.env.close()
    finally:
        pooled.thread.shutdown()


@dataclass(frozen=True, slots=True)
class _Closing:
    """An environment that is being closed."""

    future: Future[None]
    what: str
    started: float


def _key(choice: EnvironmentChoice | None) -> str:
    """Environments with the same key may stand in for each other."""
    return "" if choice is None else f"{choice.env_id} {json.dumps(choice.options, sort_keys=True)}"
