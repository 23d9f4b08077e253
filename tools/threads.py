"""Where code runs that is not asynchronous and may never return: where it stands, or in a thread.

A thread cannot be killed. What does not return in time is given up: it is counted, its thread is replaced, and, as a
daemon, keeps no process from ending.
"""

from __future__ import annotations

import asyncio
import contextlib
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
        job: _Submitted = _Submitted(
            functools.partial(contextvars.copy_context().run, function, *args, **kwargs), Future()
        )
        self._put(job)
        return job.future

    async def __call__(
        self, function: Callable[[], Any], *, timeout_s: float | None = None, what: str = ""
    ) -> Any:
        """The function's value, awaited.

        Raises:
            GivenUp: it did not return in `timeout_s`; `what` names it in `still_running`.
            Escaped: it raised what no coroutine may.
        """
        loop = asyncio.get_running_loop()
        job = _Awaited(functools.partial(contextvars.copy_context().run, Returned.of, function), loop)
        self._put(job)
        # A timer costs less than `asyncio.timeout`, and nothing else can end the wait but a cancellation.
        timer = None if timeout_s is None else loop.call_later(timeout_s, _answer, job.answer, None)
        try:
            returned = await job.answer
        except BaseException:
            self._give_up(job, what)
            raise
        finally:
            if timer is not None:
                timer.cancel()
        if returned is None:
            self._give_up(job, what)
            raise GivenUp
        return returned.get()

    def call(self, function: Callable[[], Any], *, timeout_s: float | None = None, what: str = "") -> Any:
        """As awaiting it, for a caller that is a thread."""
        run = functools.partial(contextvars.copy_context().run, Returned.of, function)
        job = _Submitted(run, Future())
        self._put(job)
        try:
            returned: Returned = job.future.result(timeout_s)
        except TimeoutError:
            self._give_up(job, what)
            raise GivenUp from None
        except BaseException:
            self._give_up(job, what)
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

    def _put(self, job: _Job) -> None:
        with self._lock:
            if self._worker is None:
                self._is_shut_down = False
                self._worker = _Worker()
                weakref.finalize(self, self._worker.end)
                self._worker.start(self._name)
            self._worker.put(job)

    def _give_up(self, job: _Job, what: str) -> None:
        if job.cancel():
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


async def on_loop(function: Callable[[], Any], *, timeout_s: float | None = None, what: str = "") -> Any:
    """Run it on the event loop, for what its author declares to return at once; nothing can end it there."""
    del timeout_s, what
    return Returned.of(function).get()


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


class _Job(Protocol):
    """What a worker is to do. Each of these is called once, `begin` and `cancel` from two threads."""

    def begin(self) -> bool:
        """Whether it is still wanted; then it is run."""
        ...

    def run(self) -> Callable[[], None]:
        """Run it, and return what tells of it."""
        ...

    def cancel(self) -> bool:
        """Whether it has not begun, and never will."""
        ...


@dataclass(eq=False, slots=True)
class _Submitted:
    """A call whose caller has a `Future`."""

    function: Callable[[], Any]
    future: Future[Any]

    def begin(self) -> bool:
        return self.future.set_running_or_notify_cancel()

    def run(self) -> Callable[[], None]:
        returned = Returned.of(self.function)
        if returned.error is None:
            return functools.partial(self.future.set_result, returned.value)
        return functools.partial(self.future.set_exception, _passable(returned.error))

    def cancel(self) -> bool:
        return self.future.cancel()


class _Awaited:
    """A call that is awaited in an event loop: one message to the loop, at a third of the price of a `Future`."""

    def __init__(self, function: Callable[[], Returned], loop: asyncio.AbstractEventLoop) -> None:
        self.answer: asyncio.Future[Returned | None] = loop.create_future()
        """None when its time is over."""
        self._function = function
        self._loop = loop
        self._unclaimed = [True]

    def begin(self) -> bool:
        return self._claim()

    def run(self) -> Callable[[], None]:
        return functools.partial(self._tell, self._function())

    def cancel(self) -> bool:
        return self._claim()

    def _claim(self) -> bool:
        """Whether nobody else has: taking the last item of a list is one operation."""
        try:
            return self._unclaimed.pop()
        except IndexError:
            return False

    def _tell(self, returned: Returned) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed, and nobody waits
            self._loop.call_soon_threadsafe(_answer, self.answer, returned)


def _answer(answer: asyncio.Future[Returned | None], returned: Returned | None) -> None:
    if not answer.done():
        answer.set_result(returned)


@dataclass(eq=False)
class _Worker:
    """A thread and what it is to do; knows nothing of the `PinnedThread`, so that one that is garbage ends it."""

    calls: SimpleQueue[_Job | None] = field(default_factory=SimpleQueue)
    lock: threading.Lock = field(default_factory=threading.Lock)
    num_pending: int = 0
    thread: threading.Thread | None = None

    def start(self, name: str) -> None:
        self.thread = threading.Thread(target=self._run, name=name, daemon=True)
        self.thread.start()

    def put(self, job: _Job) -> None:
        with self.lock:
            self.num_pending += 1
        self.calls.put(job)

    def end(self) -> None:
        """After what was put before."""
        self.calls.put(None)

    def _run(self) -> None:
        while (job := self.calls.get()) is not None:
            tell = job.run() if job.begin() else None
            self._done()  # first, so that whoever has the value finds the thread idle
            if tell is not None:
                tell()
            del job, tell  # nothing of an episode is kept until the next call

    def _done(self) -> None:
        with self.lock:
            self.num_pending -= 1
