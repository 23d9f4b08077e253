"""How a tool environment runs its hooks: where they stand or in threads, awaited or not."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import inspect
import signal
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any, Protocol

from polyturn.tools.threads import GivenUp, PinnedThread, Returned
from polyturn.tools.tool import MAX_RESULT_CHARS


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


@dataclass(frozen=True, kw_only=True, slots=True)
class StepLimits:
    """What one reset or step of an environment may take. None: no limit."""

    hook_timeout_s: float | None = None
    """Seconds for each hook that the policy does not cause: setting up tools, `begin`, `follow_up`, grading."""
    tools_timeout_s: float | None = None
    """Seconds for the tool calls of one step together, without their waits for slots."""
    queue_timeout_s: float | None = None
    """Seconds that a tool call may wait for a slot of its tool."""
    max_tool_calls: int | None = None
    """Calls of one action that are made; the others are told so."""
    max_result_chars: int | None = MAX_RESULT_CHARS
    """Characters that the model is shown of a result, where the tool sets no limit of its own."""


NO_LIMITS = StepLimits()


def current_task() -> asyncio.Task[Any] | None:
    """The task that runs; None outside of an event loop."""
    try:
        return asyncio.current_task()
    except RuntimeError:
        return None


def is_interruption(error: BaseException, task: asyncio.Task[Any] | None) -> bool:
    """Whether an exception is meant for whoever plays the episode in `task`, and was not raised by code of the episode.

    That is a cancellation of the task, the end of a coroutine that is thrown away, and the user's Ctrl-C. Code of an
    episode may raise the same exceptions; then they are its failure like any other.
    """
    if isinstance(error, asyncio.CancelledError):
        return task is not None and task.cancelling() > 0
    if isinstance(error, GeneratorExit):
        return current_task() is not task
    if isinstance(error, KeyboardInterrupt):
        # Ctrl-C raises it in the main thread only, and only where nobody else handles the signal.
        is_main = threading.current_thread() is threading.main_thread()
        return is_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    return False


def is_async_function(function: Callable[..., Any]) -> bool:
    """As `inspect.iscoroutinefunction`, at a tenth of its price for functions and methods."""
    code = getattr(function, "__code__", None)
    return (
        inspect.iscoroutinefunction(function) if code is None else bool(code.co_flags & inspect.CO_COROUTINE)
    )
