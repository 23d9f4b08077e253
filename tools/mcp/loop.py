"""One event loop in a thread of its own, for what must go on whoever calls."""

from __future__ import annotations

import asyncio
import functools
import os
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

Value = TypeVar("Value")


class BackgroundLoop:
    """An event loop that runs until the process ends."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="polyturn mcp", daemon=True)
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, Value]) -> Value:
        """Run `coroutine` there and wait for its value in this thread."""
        if threading.current_thread() is self._thread:
            coroutine.close()
            raise RuntimeError("the background loop cannot wait for itself")
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    async def await_(self, coroutine: Coroutine[Any, Any, Value]) -> Value:
        """Run `coroutine` there and await its value in the running loop, whichever that is."""
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(coroutine, self._loop))


def background_loop() -> BackgroundLoop:
    """This process's one."""
    return _background_loop(os.getpid())


@functools.lru_cache(maxsize=1)
def _background_loop(owner: int) -> BackgroundLoop:
    del owner  # a fork has no threads of its parent's
    return BackgroundLoop()
