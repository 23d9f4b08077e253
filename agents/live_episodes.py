"""How many episodes have their KV in the engines at once; the others are paused until there is room."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Hashable


class LiveEpisodes:
    """A semaphore over episodes whose limit may change; first come, first served.

    An episode enters before each of its requests and stays in, through its tool calls, until it leaves: its KV is
    worth keeping for all that time. When the limit falls below the number of those that are in, the next ones to ask
    are paused: they come out, the engines may drop their KV, and they wait in front of all that have not begun.

        new ---enter---> in ---leave---> gone
                         | ^
            limit is low | | room
                         v |
                        paused

    Nothing is taken from an episode while its request runs.
    """

    def __init__(self, limit: int) -> None:
        assert limit >= 1, "at least one episode"
        self._limit = limit
        self._in: set[Hashable] = set()
        self._paused: OrderedDict[Hashable, asyncio.Future[None]] = OrderedDict()
        self._new: OrderedDict[Hashable, asyncio.Future[None]] = OrderedDict()
        self.num_pauses = 0

    @property
    def limit(self) -> int:
        """Episodes that may be in."""
        return self._limit

    @limit.setter
    def limit(self, value: int) -> None:
        assert value >= 1, "at least one episode"
        self._limit = value
        self._admit()

    @property
    def num_in(self) -> int:
        """Episodes that are in."""
        return len(self._in)

    @property
    def num_waiting(self) -> int:
        """Episodes that would be in if there was room."""
        return len(self._paused) + len(self._new)

    async def enter(self, episode: Hashable) -> None:
        """Come in, or stay in; waits for room. One call at a time for each episode, which must leave in the end."""
        was_in = episode in self._in
        if was_in and len(self._in) <= self._limit:
            return
        if was_in:
            self._in.remove(episode)
            self.num_pauses += 1
        queue = self._paused if was_in else self._new
        admitted = queue[episode] = asyncio.get_running_loop().create_future()
        self._admit()
        try:
            await admitted
        finally:
            queue.pop(episode, None)

    def leave(self, episode: Hashable) -> None:
        """Go for good. Whoever is not in may leave, too."""
        self._in.discard(episode)
        self._admit()

    def _admit(self) -> None:
        while len(self._in) < self._limit and (queue := self._paused or self._new):
            episode, admitted = queue.popitem(last=False)
            if not admitted.cancelled():
                self._in.add(episode)
                admitted.set_result(None)
