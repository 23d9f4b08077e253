"""Things that take long to start, kept ready: a few of each kind that was asked for lately."""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

from polyturn.tools.sandbox.types import SandboxUnavailable

K = TypeVar("K")
T = TypeVar("T")

NUM_KINDS = 4
NUM_THREADS = 4


class Pool(Generic[K, T]):
    """Starts one thing ahead for each that is taken. Usable from many threads at a time."""

    def __init__(
        self,
        *,
        start: Callable[[K], T],
        is_alive: Callable[[T], bool],
        discard: Callable[[T], None],
        size: int,
    ) -> None:
        """`size` is how many of a kind are kept ready once one was taken; 0 keeps none."""
        if size < 0:
            raise ValueError(f"a pool cannot keep {size} ready")
        self._start, self._is_alive, self._discard, self._size = start, is_alive, discard, size
        self._lock = threading.Lock()
        self._ready: OrderedDict[K, deque[T]] = OrderedDict()
        self._num_starting: dict[K, int] = {}
        self._closed = False
        self._threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="sandbox-pool")

    def take(self, kind: K) -> T:
        """One that is alive, ready or started while the caller waits. Raises what `start` raises."""
        try:
            while (thing := self._pop(kind)) is not None:
                if self._is_alive(thing):
                    return thing
                self._discard(thing)
            return self._start(kind)
        finally:
            self._refill(kind)

    def discard_soon(self, thing: T) -> None:
        """Discards it in the background; at once when the pool is closed."""
        with self._lock:
            if not self._closed:
                self._threads.submit(self._discard, thing)
                return
        self._discard(thing)

    def close(self) -> None:
        """Waits for the work in the background and discards what is ready."""
        with self._lock:
            self._closed = True
        self._threads.shutdown(wait=True)
        for things in self._ready.values():
            for thing in things:
                self._discard(thing)
        self._ready.clear()

    def _pop(self, kind: K) -> T | None:
        with self._lock:
            things = self._ready.get(kind)
            return things.popleft() if things else None

    def _refill(self, kind: K) -> None:
        with self._lock:
            if self._closed:
                return
            self._ready.setdefault(kind, deque())
            self._ready.move_to_end(kind)
            while len(self._ready) > NUM_KINDS:
                for thing in self._ready.popitem(last=False)[1]:
                    self._threads.submit(self._discard, thing)
            missing = self._size - len(self._ready[kind]) - self._num_starting.get(kind, 0)
            for _ in range(missing):
                self._num_starting[kind] = self._num_starting.get(kind, 0) + 1
                self._threads.submit(self._start_one, kind).add_done_callback(_raise_unexpected)

    def _start_one(self, kind: K) -> None:
        thing: T | None = None
        try:
            thing = self._start(kind)
        except SandboxUnavailable:
            pass  # whoever needs one starts it in the foreground, and is told
        finally:
            with self._lock:
                self._num_starting[kind] -= 1
                if self._num_starting[kind] == 0:
                    del self._num_starting[kind]
                wanted = thing is not None and not self._closed and kind in self._ready
                if wanted and thing is not None:
                    self._ready[kind].append(thing)
        if thing is not None and not wanted:
            self._discard(thing)


def _raise_unexpected(future: Future[None]) -> None:
    """Logs a fault of ours (the executor would keep it to itself)."""
    future.result()
