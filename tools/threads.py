"""Where code runs that is not asynchronous and may never return: where it stands, or in a thread.

A thread cannot be killed. What does not return in time is given up: it is counted, its thread is replaced, and, as a
daemon, keeps no process from ending.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import threading
import weakref
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any, ParamSpec, Protocol, TypeVar

Parameters = ParamSpec("Parameters")
Value = TypeVar("Value")


class GivenUp(Exception):
    """A function did not return in time; its thread goes on, because a thread cannot be killed."""


class Escaped(Exception):
    """A function raised what must not pass through a coroutine or a thread, such as StopIteration or SystemExit.

    asyncio takes them for its own, and waits for ever or ends the event loop.
    """

    def __init__(self, error: BaseException) -> None:
        super().__init__(f"{type(error).__name__}: {error}")
        self.error = error


@dataclass(frozen=True, slots=True)
class Returned:
    """How a function ended, as a value that can pass through any thread and coroutine."""

    value: Any = None
    error: BaseException | None = None

    @classmethod
    def of(cls, function: Callable[[], Any]) -> Returned:
        """Run the function."""
        try:
            return cls(function())
        except BaseException as error:  # noqa: BLE001  it goes to whoever waits, whatever it is
            return cls(error=error)

    def get(self) -> Any:
        """The value, or raise: an exception that must not pass as it is becomes `Escaped`."""
        if self.error is None:
            return self.value
        raise _passable(self.error)


def _passable(error: BaseException) -> Exception:
    if isinstance(error, Exception) and not isinstance(error, StopIteration | StopAsyncIteration):
        return error
    escaped = Escaped(error)
    escaped.__cause__ = error
    return escaped


class PinnedThread(Executor):
    """One thread that runs calls one after the other, so what is bound to a thread, such as a sqlite3 connection or a
    browser, can be made in one call and used in the next.

    The call that is given up keeps the thread; the next call begins a new one.
    """

    def __init__(self, name: str = "pinned") -> None:
        self._name = name
        self._lock = threading.Lock()
        self._worker: _Worker | None = None
        self._given_up: list[tuple[_Worker, str]] = []
        self._is_shut_down = False

    def submit(
        self, function: Callable[Parameters, Value], /, *args: Parameters.args, **kwargs: Parameters.kwargs
    ) -> Future[Value]:
        """As any executor. The calling context's variables are the function's."""
        future: Future[Value] = Future()
        context = contextvars.copy_context()
        with self._lock:
            if self._worker is None:
                self._is_shut_down = False
                self._worker = _Worker()
                weakref.finalize(self, self._worker.end)
                self._worker.start(self._name)
            self._worker.put(future, lambda: context.run(function, *args, **kwargs))
        return future

    async def __call__(
        self, function: Callable[[], Any], *, timeout_s: float | None = None, what: str = ""
    ) -> Any:
        """The function's value, awaited.

        Raises:
            GivenUp: it did not return in `timeout_s`; `what` names it in `still_running`.
            Escaped: it raised what no coroutine may.
        """
        future = self.submit(Returned.of, function)
        deadline = asyncio.timeout(timeout_s)
        try:
            async with deadline:
                returned: Returned = await asyncio.wrap_future(future)
        except TimeoutError:
            self._give_up(future, what)
            raise GivenUp from None
        except BaseException:
            self._give_up(future, what)
            raise
        return returned.get()

    def call(self, function: Callable[[], Any], *, timeout_s: float | None = None, what: str = "") -> Any:
        """As awaiting it, for a caller that is a thread."""
        future = self.submit(Returned.of, function)
        try:
            returned: Returned = future.result(timeout_s)
        except TimeoutError:
            self._give_up(future, what)
            raise GivenUp from None
        except BaseException:
            self._give_up(future, what)
            raise
        return returned.get()

    @property
    def still_running(self) -> tuple[str, ...]:
        """What was given up and has not returned yet."""
        with self._lock:
            self._given_up = [(worker, what) for worker, what in self._given_up if worker.num_pending]
            return tuple(what for _, what in self._given_up)

    @property
    def is_idle(self) -> bool:
        """Whether nothing runs, be it given up or not."""
        return not self.still_running and (self._worker is None or not self._worker.num_pending)

    @property
    def is_current(self) -> bool:
        """Whether this is asked in the thread itself."""
        return self._worker is not None and self._worker.thread is threading.current_thread()

    @property
    def is_shut_down(self) -> bool:
        """Whether nothing was submitted since `shutdown`."""
        return self._is_shut_down

    def shutdown(self, wait: bool = False, *, cancel_futures: bool = False) -> None:
        """End the thread after what was submitted; nothing is waited for. A later call begins a new one."""
        del wait, cancel_futures
        with self._lock:
            worker, self._worker = self._worker, None
            self._is_shut_down = True
        if worker is not None:
            worker.end()

    def _give_up(self, future: Future[Any], what: str) -> None:
        if future.cancel():
            return  # never begun: the thread is busy with something else, or about to be
        with self._lock:
            worker = self._worker
            if worker is None or not worker.num_pending:
                return
            self._worker = None
            self._given_up.append((worker, what))
        worker.end()


class Offload(Protocol):
    """Runs a function somewhere and gives its value. `PinnedThread` is one."""

    def __call__(
        self, function: Callable[[], Any], *, timeout_s: float | None = None, what: str = ""
    ) -> Awaitable[Any]:
        """Raises what the function raises, `Escaped` for what no coroutine may raise, and `GivenUp` when it does not
        return in time."""
        ...


async def inline(function: Callable[[], Any], *, timeout_s: float | None = None, what: str = "") -> Any:
    """Run it where it stands, however long it takes."""
    del timeout_s, what
    return function()


@dataclass(frozen=True, slots=True)
class Blocking:
    """Run it in a thread that the caller waits for, without an event loop."""

    thread: PinnedThread

    async def __call__(
        self, function: Callable[[], Any], *, timeout_s: float | None = None, what: str = ""
    ) -> Any:
        return self.thread.call(function, timeout_s=timeout_s, what=what)


def in_threads(executor: Executor) -> Offload:
    """Run things in threads of `executor`, with the context variables of the caller."""
    if isinstance(executor, PinnedThread):
        return executor

    async def offload(function: Callable[[], Any], *, timeout_s: float | None = None, what: str = "") -> Any:
        del what
        call = functools.partial(contextvars.copy_context().run, Returned.of, function)
        try:
            async with asyncio.timeout(timeout_s):
                returned: Returned = await asyncio.get_running_loop().run_in_executor(executor, call)
        except TimeoutError:
            raise GivenUp from None
        return returned.get()

    return offload


@dataclass(eq=False)
class _Worker:
    """A thread and what it is to do; knows nothing of the `PinnedThread`, so that one that is garbage ends it."""

    calls: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = field(default_factory=SimpleQueue)
    lock: threading.Lock = field(default_factory=threading.Lock)
    num_pending: int = 0
    thread: threading.Thread | None = None

    def start(self, name: str) -> None:
        self.thread = threading.Thread(target=self._run, name=name, daemon=True)
        self.thread.start()

    def put(self, future: Future[Any], function: Callable[[], Any]) -> None:
        with self.lock:
            self.num_pending += 1
        self.calls.put((future, function))

    def end(self) -> None:
        """After what was put before."""
        self.calls.put(None)

    def _run(self) -> None:
        while (item := self.calls.get()) is not None:
            future, function = item
            del item
            if not future.set_running_or_notify_cancel():
                self._done()
                continue
            returned = Returned.of(function)
            self._done()  # first, so that whoever has the value finds the thread idle
            if returned.error is None:
                future.set_result(returned.value)
            else:
                future.set_exception(_passable(returned.error))
            del future, function, returned  # nothing of an episode is kept until the next call

    def _done(self) -> None:
        with self.lock:
            self.num_pending -= 1
