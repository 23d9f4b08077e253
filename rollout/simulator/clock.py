"""An event loop in virtual time: where nothing is ready, the clock goes to the next timer, and nobody waits."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Coroutine
from typing import Any, NoReturn, TypeVar

Value = TypeVar("Value")


class _NeverBlocks(selectors.SelectSelector):
    """Moves the clock by what it was to wait for."""

    def __init__(self, advance: Callable[[float], None]) -> None:
        super().__init__()
        self._advance = advance

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise RuntimeError("everything waits, and nothing is going to happen")
        if timeout > 0:
            self._advance(timeout)
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    """Timers alone: it has no threads and reads no sockets, whose time would be another."""

    def __init__(self) -> None:
        self._now = 0.0
        super().__init__(_NeverBlocks(self._pass))

    def time(self) -> float:
        """Seconds since the loop was made."""
        return self._now

    def _pass(self, seconds: float) -> None:
        self._now += seconds

    def run_in_executor(self, *_: object) -> NoReturn:
        """There are no threads."""
        raise RuntimeError("in virtual time nothing runs in a thread")


def run_virtually(main: Coroutine[Any, Any, Value]) -> Value:
    """Run a coroutine to its end in a loop of its own. Raises `RuntimeError` where it waits for ever."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main)
